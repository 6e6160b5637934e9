from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from lit_lora.tools.training.fitting import out_of_time, resuming


@pytest.mark.parametrize(("seconds", "over"), [(None, False), (60, False), (0, True)])
def test_a_run_that_has_used_up_its_time(seconds: int | None, over: bool, tmp_path: Path) -> None:
    timers = [] if seconds is None else [Timer(timedelta(seconds=seconds))]
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[*timers], **options)
    assert out_of_time(trainer) is over


def test_a_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    of_logger = tmp_path / "lightning_logs" / "version_3"
    assert resuming(of_logger, tmp_path) == ["--ckpt_path", "last", "--trainer.logger.init_args.version", "3"]
    assert resuming(tmp_path, tmp_path) == ["--ckpt_path", "last"]
    other = tmp_path / "project" / "run"
    assert resuming(other, tmp_path) == ["--ckpt_path", str(other / "checkpoints" / "last.ckpt")]
