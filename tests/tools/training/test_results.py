from __future__ import annotations

import os
from pathlib import Path

from lit_lora.tools.training.results import best_adapter, newest_run, results_of
from lit_lora.tools.training.run import resuming
from lit_lora.tools.training.screen import ending


def save(run: Path, name: str, time: float) -> None:
    path = run / "checkpoints" / f"{name}.ckpt"
    adapter = path.with_suffix(".adapter")
    adapter.mkdir(parents=True)
    path.touch()
    for one in (path, adapter):
        os.utime(one, (time, time))


def test_a_clock_that_was_set_back_makes_no_older_run_the_newest(tmp_path: Path) -> None:
    for version, time in ((9, 3000), (10, 2000), (2, 4000)):
        save(tmp_path / "lightning_logs" / f"version_{version}", "last", time)
    newest = newest_run(tmp_path)
    assert newest is not None
    assert newest.name == "version_10"
    save(newest, "best-step=90", 3000)
    save(newest, "best-step=100", 1000)
    assert best_adapter(newest) == newest / "checkpoints" / "best-step=100.adapter"
    assert resuming(newest, tmp_path)[-1] == "10"
    (newest / "metrics.csv").touch()  # CSVLogger deletes it where it begins, so the run goes on in a version of its own
    assert resuming(newest, tmp_path) == ["--ckpt_path", "last"]


def test_runs_of_other_loggers_are_found(tmp_path: Path) -> None:
    """Without a logger the run's folder is that of the command; of Weights & Biases it has a name of its own."""
    alone, named = tmp_path / "alone", tmp_path / "named"
    save(alone, "last", 1)
    save(named / "project" / "x7k", "last", 1)
    assert results_of(alone) == {"folder": str(alone), "adapter": "checkpoints/last.adapter"}
    assert resuming(alone, alone) == ["--ckpt_path", "last"]
    run = newest_run(named)
    assert run == named / "project" / "x7k"
    assert resuming(run, named) == ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]


def test_a_run_that_saved_elsewhere_says_so(tmp_path: Path) -> None:
    assert "the run's folder holds no adapter" in ending(results_of(tmp_path), "a cat")
    assert "the run's folder holds no adapter" in ending({"folder": str(tmp_path)}, "a cat")
