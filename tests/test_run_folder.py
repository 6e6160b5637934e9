"""Runs with one ``save_dir`` do not write over each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from lit_lora.cli import main
from lit_lora.run_folder import run_folder
from tests.helpers import processes
from tests.job_run import write_job
from tests.shared_logger import SharedLogger

CALLBACKS: list[dict[str, Any]] = [
    {"class_path": "AdapterCheckpoint", "init_args": {"save_last": True}},
    {"class_path": "SampleImages", "init_args": {"prompts": ["a star"], "num_inference_steps": 1}},
    {"class_path": "RunReport"},
    {"class_path": "MemoryProfiler"},
]


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_run_has_its_own_folder_in_one_save_dir(
    count: int, sd_folder: Path, make_shards: Any, tmp_path: Path
) -> None:
    make_shards(8)
    logger = {"class_path": "tests.shared_logger.SharedLogger", "init_args": {"save_dir": str(tmp_path / "logs")}}
    strategy = "ddp" if count > 1 else "auto"
    options = {"processes": count, "strategy": strategy, "logger": logger, "max_epochs": -1}
    config = write_job(tmp_path / "run", sd_folder, tmp_path / "shards", *CALLBACKS, **options)
    output = tmp_path / "output"
    output.mkdir()
    written: list[Path] = []
    for number, seed in enumerate((1, 2)):
        arguments = ["fit", "--config", str(config), "--model.seed", str(seed), "--trainer.max_steps", "2"]
        if count > 1:
            processes(["-m", "lit_lora.cli", *arguments], count, output)
        else:
            assert main(arguments) == 0
        found = sorted((tmp_path / "logs").iterdir())
        assert [path.name for path in found] == ["project"]
        runs = sorted(found[0].iterdir(), key=lambda path: path.stat().st_mtime)
        assert len(runs) == number + 1
        written.append(next(run for run in runs if run not in written))
    for folder, seed in zip(written, (1, 2), strict=True):
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["seed"] == seed
        assert {path.name for path in folder.iterdir()} >= {"checkpoints", "samples", "report.json", "memory.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml"}


@pytest.mark.parametrize(
    ("logger", "expected"),
    [
        (False, "root"),
        (CSVLogger("root/logs", name="n", version=3), "root/logs/n/version_3"),
        (SharedLogger("root/logs"), "root/logs/project/None"),
    ],
)
def test_the_folder_of_each_kind_of_logger(logger: Logger | bool, expected: str) -> None:
    assert run_folder(Trainer(accelerator="cpu", logger=logger, default_root_dir="root")) == expected
