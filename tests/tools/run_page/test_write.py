"""``lit-lora report``: what a run left, on one page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lit_lora.cli import main
from lit_lora.errors import UserError
from lit_lora.profiling.kinds import KINDS
from lit_lora.tools.run_page.write import run_of, write_page

EVIL = "<script>alert('x')</script>&\""
PHASE = {kind: 10**6 * (i + 1) for i, kind in enumerate(KINDS)}


class _Tags(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: Path) -> _Tags:
    parser = _Tags()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    return parser


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that left everything, with markup in every text."""
    folder = tmp_path / "digits" / "lightning_logs" / "version_1"
    (folder / "samples").mkdir(parents=True)
    figures = {"optimizer_steps": 30, "train_seconds": 65.0, "samples_per_second": 7.25, "energy_cost": None}
    report: dict[str, Any] = {"status": EVIL, "total": figures, "peak_memory": 3 * 10**9, "peak_memory_of": "resident"}
    report |= {"adapter_parameters": 5855, "adapter_ranks": {f"layer{EVIL}": 4, "other": 12}}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "memory.json").write_text(json.dumps({"phases": {"forward": {"kinds": PHASE}, EVIL: {"kinds": PHASE}}}))
    plan = {"needed": 2 * 10**9, "phases": {"forward": PHASE}}
    (tmp_path / "digits" / "memory_plan.json").write_text(json.dumps(plan))
    rows = [(0, "", 0.5, ""), (9, 0.4, "", 1e-3), (9, "", 0.25, ""), (19, 0.3, "", "nan"), (29, 0.2, 0.4, 2e-3)]
    rows = [(*row[:3], row[2], row[2] and 2 * float(row[2]), *row[3:]) for row in rows]
    lines = [
        "step,train/loss,val/loss,val/loss_q1,val/loss_q4,lr" + EVIL.replace('"', ""),
        *(",".join(map(str, row)) for row in rows),
    ]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    sampler = {"class_path": "lit_lora.callbacks.SampleImages", "init_args": {"prompts": [EVIL, "a star"], "seed": 3}}
    config = {
        "seed_everything": EVIL,
        "trainer": {"callbacks": [sampler]},
        "data": "https://user:secret@host/x?token=t",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in (0, 30):
        Image.new("RGB", (8, 8), "red").save(folder / "samples" / f"step-{step:06d}.png")
    for name in ("last.adapter", "best-step=10.adapter"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    card = f'# card {EVIL}\n```python\npipeline.load_lora_weights("this folder")  # {EVIL}\n```\n'
    (folder / "checkpoints" / "best-step=10.adapter" / "README.md").write_text(card)
    return folder


def test_a_run_from_an_adapter_is_held_against_that_adapter(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text()) | {
        "model": {"adapter": {"class_path": "lit_lora.FromFile"}}
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = parsed(write_page(run, run / "page.html")).text
    for told in (
        "against the adapter at the start",
        "the adapter at the start: 0.5",
        "step 0, the adapter at the start",
    ):
        assert told in text
    assert "the base: " not in text


def test_all_that_a_run_left_is_on_the_page(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(tmp_path / "digits")]) == 0
    page = parsed(run / "report.html")
    assert "digits, version 1" in page.text
    for told in ("1 min 5 s", "7.25", "0.25", "-50%", "5,855", "3.0 GB", "2.0 GB", "the base: 0.5", "step 30"):
        assert told in page.text, told
    for told in (
        "forward, planned",
        "forward, measured",
        "2 layers have ranks from 4 to 12, 8 on average",
        "a star (seed 4)",
        "Validation by noise",
        "most noise",
    ):
        assert told in page.text, told
    assert "1 of 3 values of lr" in page.text
    assert f"--adapter {run}/checkpoints/best-step=10.adapter" in page.text
    assert f"load_lora_weights('{run}/checkpoints/best-step=10.adapter')" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_what_comes_from_data_is_text_and_nothing_is_fetched(run: Path, tmp_path: Path) -> None:
    """No element of the data's, no script, no address of another host, no password."""
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = parsed(out)
    assert page.text.count(EVIL) >= 6
    assert "script" not in {tag for tag, _ in page.tags}
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "object", "a", "form", "base"} == set()
    sources = [
        attributes[name] for _, attributes in page.tags for name in ("src", "href", "data") if name in attributes
    ]
    assert sources
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    style = re.findall(r"<style>(.*?)</style>", out.read_text(), re.DOTALL)
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert ("meta", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in page.tags
    ]
    assert "https://host/x" in page.text
    assert "secret" not in page.text
    assert "token" not in page.text


def test_a_run_without_most_parts_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-000010.png").write_bytes(b"no image")
    (tmp_path / "report.json").write_text("{")
    text = parsed(write_page(tmp_path)).text
    for told in ("report.json cannot be read", "step-000010.png cannot be read", "No losses", "No adapter", "No plan"):
        assert told in text, told
    for told in ("No measured phases", "No ranks", "No config.yaml", "No report.json: the run is going on"):
        assert told in text, told


def test_large_images_become_small_and_many_become_few(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    noise = Image.effect_noise((1500, 300), 90)
    for step in range(0, 150, 10):
        noise.convert("RGB").save(tmp_path / "samples" / f"step-{step:06d}.png", compress_level=1)
    out = write_page(tmp_path, tmp_path / "page.html")
    page = parsed(out)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 12
    assert {(image["width"], image["height"], str(image["src"])[:15]) for image in images} == {
        ("1024", "205", "data:image/jpeg")
    }
    assert "3 more grids are in" in page.text
    assert "step 0, the base" in page.text
    assert "step 140" in page.text


def test_the_newest_version_is_the_run(tmp_path: Path) -> None:
    for number in (2, 10):
        (tmp_path / "lightning_logs" / f"version_{number}").mkdir(parents=True)
        (tmp_path / "lightning_logs" / f"version_{number}" / "metrics.csv").touch()
    (tmp_path / "lightning_logs" / "version_11").mkdir()  # empty
    newest = tmp_path / "lightning_logs" / "version_10"
    assert run_of(tmp_path) == run_of(tmp_path / "lightning_logs") == run_of(newest) == newest
    for number, option in (("11", "verbose: true"), ("12", "return_predictions: null")):  # of validate and of predict
        later = tmp_path / "lightning_logs" / f"version_{number}"
        later.mkdir(exist_ok=True)
        (later / "events.out.tfevents.1").touch()
        (later / "config.yaml").write_text(f"trainer:\n  max_steps: 2\n{option}\n")
    assert run_of(tmp_path) == newest


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run's folder: it has no logs" in capsys.readouterr().err
    with pytest.raises(UserError, match="is no folder; name the folder of a run"):
        write_page(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_no_run(tmp_path: Path) -> None:
    adapter = tmp_path / "checkpoints" / "last.adapter"
    (adapter / "samples").mkdir(parents=True)
    for name in ("adapter_config.json", "samples/step-000001.png"):  # of its card
        (adapter / name).touch()
    with pytest.raises(UserError, match=rf"is an adapter; name the folder of its run, such as {tmp_path}$"):
        run_of(adapter)


@pytest.mark.parametrize("name", ["page", "page.pdf", "missing/folder"])
def test_a_page_is_html(name: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is neither a folder nor has it the ending .html; name a file such as report.html"
    ):
        write_page(run, tmp_path / name)
    assert write_page(run, tmp_path / "page.html") == tmp_path / "page.html"
