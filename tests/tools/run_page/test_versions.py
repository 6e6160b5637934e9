"""A page about a resumed run shows it from its beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lit_lora.tools.run_page.facts import read_run
from lit_lora.tools.run_page.versions import best_of, earlier_versions


def version(logs: Path, number: int, ckpt_path: str | None, losses: dict[int, float], saves: bool = True) -> Path:
    folder = logs / f"version_{number}"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"ckpt_path": ckpt_path}))
    rows = "".join(f"{step - 1},{loss}\n" for step, loss in losses.items())  # Lightning counts them from 0
    (folder / "metrics.csv").write_text("step,train/loss\n" + rows)
    Image.new("RGB", (8, 8)).save(folder / "samples" / f"step-{max(losses):06d}.png")
    if saves:
        (folder / "checkpoints" / "last.adapter").mkdir(parents=True)
        (folder / "checkpoints" / "last.ckpt").touch()
    return folder


def test_curves_and_samples_of_all_versions_are_joined_by_step(tmp_path: Path) -> None:
    first = version(tmp_path, 8, None, {1: 0.5, 2: 0.4, 3: 0.3, 4: 0.25})
    (first / "checkpoints" / "best-step=2.adapter").mkdir()
    failed = version(tmp_path, 9, "last", {3: 0.9}, saves=False)  # ended before its first checkpoint
    second = version(tmp_path, 10, "last", {3: 0.31, 4: 0.21})
    third = version(tmp_path, 11, f"elsewhere/{second.name}/checkpoints/last.ckpt", {5: 0.1})
    version(tmp_path, 12, None, {1: 0.6})
    assert earlier_versions(third) == [first, second]
    assert earlier_versions(failed) == [first]
    facts = read_run(third)
    assert facts.curves == {"train/loss": [(1, 0.5), (2, 0.4), (3, 0.31), (4, 0.21), (5, 0.1)]}
    assert facts.samples == {
        step: folder / "samples" / f"step-{step:06d}.png" for step, folder in ((4, second), (5, third))
    }
    assert facts.adapter == first / "checkpoints" / "best-step=2.adapter"
    assert facts.notes == [
        "curves and samples are those of versions that were resumed one from another: version_8 from step 1, version_10 from "
        "step 3, version_11 from step 5"
    ]


@pytest.mark.parametrize("ckpt_path", [None, "last"])
def test_a_run_that_began_anew_has_no_earlier_versions(ckpt_path: str | None, tmp_path: Path) -> None:
    version(tmp_path, 0, None, {1: 0.5}, saves=ckpt_path is None)
    facts = read_run(version(tmp_path, 1, ckpt_path, {1: 0.4}))
    assert facts.curves == {"train/loss": [(1, 0.4)]}
    assert facts.notes == []


def test_a_checkpoint_of_another_folder_is_named(tmp_path: Path) -> None:
    facts = read_run(version(tmp_path, 0, "https://user:secret@host/old.ckpt", {20: 0.4, 30: 0.2}))
    assert facts.notes == [
        "version_0 was resumed from https://host/old.ckpt, of which no logs are beside it: steps before 20 are not shown"
    ]


@pytest.mark.parametrize(("steps", "told"), [(4, False), (3, True)])
def test_a_report_that_was_written_before_the_logs_end_is_told(steps: int, told: bool, tmp_path: Path) -> None:
    folder = version(tmp_path, 0, None, {1: 0.5, 4: 0.4})
    (folder / "report.json").write_text(json.dumps({"status": "interrupted", "total": {"optimizer_steps": steps}}))
    notes = read_run(folder).notes
    assert len(notes) == told
    assert not told or notes[0].startswith(
        "report.json tells of 3 optimizer steps, and the logs go on to step 4: its status"
    )


def test_the_best_adapter_is_that_of_the_least_validation_loss() -> None:
    first, second = Path("version_0/best-step=20.adapter"), Path("version_1/best-step=40.adapter")
    assert best_of([first, second], [(10, 0.1), (20, 0.2), (30, 0.9), (40, 0.3)]) == first
    assert best_of([first, second], [(20, 0.3), (40, 0.2)]) == second
    assert best_of([first, second], []) == second
