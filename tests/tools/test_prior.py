"""``lit-lora prior``: class images in shards, from runs that may be killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lit_lora.cli import main
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.tools.drawing import Drawer


@pytest.fixture
def command(sd_folder: Path) -> list[str]:
    options = [
        "--count",
        "5",
        "--steps",
        "1",
        "--height",
        "16",
        "--width",
        "16",
        "--batch_size",
        "2",
        "--device",
        "cpu",
    ]
    return ["--base", str(sd_folder), "--prompts", "a star", "a heart", *options]


def test_a_killed_run_goes_on_to_the_same_images(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["prior", str(whole), *command]) == 0
    drawn: list[int] = []
    draw = Drawer.draw

    def ends(self: Drawer, prompts: Any, **options: Any) -> Any:
        if drawn:
            raise KeyboardInterrupt
        drawn.extend(prompt.seed for prompt in prompts)
        return draw(self, prompts, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Drawer, "draw", ends)
        assert main(["prior", str(killed), *command]) == 130
    images = killed / "images" / "class"
    assert sorted(path.name for path in images.glob("*.png")) == ["000000.png", "000001.png"]
    (images / "000002.txt").write_text("half")  # as if it had been killed between the two files of a sample
    capsys.readouterr()
    assert main(["prior", str(killed), *command]) == 0
    shown = capsys.readouterr().out
    assert "5 class images, 3 of them drawn now" in shown
    assert f"Next:\nlit-lora train FOLDER --base {command[1]} --trigger WORDS \\\n  --class_images {images}\n" in shown
    assert [line for line in shown.splitlines() if len(line) > 80 and str(tmp_path.parent.parent) not in line] == []
    name = "shards/shard-000000.tar"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    index = ShardIndex.load_or_build(killed / name)
    assert [index.key(i) for i in range(len(index))] == [f"class/{i:06d}" for i in range(5)]
    captions = [path.read_text() for path in sorted(images.glob("*.txt"))]
    assert captions == ["a star\n", "a heart\n", "a star\n", "a heart\n", "a star\n"]


def test_other_options_are_refused(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prior", str(tmp_path), *command]) == 0
    assert main(["prior", str(tmp_path), *command, "--seed", "3"]) == 2
    assert "holds images drawn with seed=0, not 3; give the same options" in capsys.readouterr().err
    assert main(["prior", str(tmp_path / "new"), "--base", "embedded"]) == 2
    assert "give --prompts: a text for the class" in capsys.readouterr().err
    entries = tmp_path / "entries.yaml"
    entries.write_text("- {prompt: a, seed: 3}\n")
    assert main(["prior", str(tmp_path / "new"), "--base", "embedded", "--prompts", str(entries)]) == 2
    assert "have no seed of their own" in capsys.readouterr().err


@pytest.mark.parametrize("known", [True, False], ids=["of a family", "of no family"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_the_base_is_known_by_its_contents(
    known: bool,
    part: str,
    sd_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not known:
        monkeypatch.setattr("lit_lora.tools.drawing.family_of_source", lambda source: None)
    base, moved, out = tmp_path / "base", tmp_path / "moved", tmp_path / "out"
    shutil.copytree(sd_folder, base)
    size = ["--height", "16", "--width", "16", "--device", "cpu"]
    options = ["prior", str(out), "--prompts", "a star", "--count", "1", "--steps", "1", *size]
    assert main([*options, "--base", str(base)]) == 0
    base.rename(moved)
    assert main([*options, "--base", str(moved)]) == 0  # the same model in another place
    [weights] = (moved / part).glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    moved.rename(base)
    capsys.readouterr()
    assert main([*options, "--base", str(base)]) == 2  # another model in the same place
    message = capsys.readouterr().err
    assert "holds images drawn by another base than" in message
    assert ("text" if part == "text_encoder" and known else "denoiser" if part == "unet" and known else part) in message


def test_the_scheduler_of_the_base_is_part_of_it(
    sd_folder: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(sd_folder, base)
    options = ["prior", str(tmp_path / "out"), "--base", str(base), *command[2:]]
    assert main(options) == 0
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    capsys.readouterr()
    assert main(options) == 2
    assert "scheduler is" in capsys.readouterr().err
