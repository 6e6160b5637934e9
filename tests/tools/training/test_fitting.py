from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_lora.errors import UserError
from lit_lora.tools.training import fitting
from lit_lora.tools.training.fitting import check_config, fit, out_of_time, resuming


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


class Terminated(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_a_signal_stops_says_how_to_go_on(
    session_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"--data.init_args.train_shards={session_shards}", "--data.init_args.val_samples=0"]
    stop = ["--trainer.callbacks=AdapterCheckpoint", f"--trainer.callbacks+={__name__}.Terminated"]
    options = [*data, *stop, "--trainer.default_root_dir", str(tmp_path)]
    with pytest.raises(SIGTERMException):
        fit(["fit", "--config", "configs/demo.yaml", "--data.init_args.batch_size=2", *options])
    assert "last.ckpt; the same command goes on\n" in capsys.readouterr().err


def test_a_config_is_checked_without_building_its_parts(
    session_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fitting._CheckCLI, "instantiate_trainer", None)  # whatever builds the parts ends with it
    data = {"class_path": "WebDatasetDataModule", "init_args": {"train_shards": str(session_shards)}}
    family = {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": "nowhere"}}
    config = {"model": {"family": family, "adapter": "LoraConfig"}, "data": data}
    check_config(config)
    with pytest.raises(UserError, match="accumulate_grad_batches=0 is too small"):
        check_config(config | {"trainer": {"accumulate_grad_batches": 0}})
    with pytest.raises(UserError, match="did you mean ddp"):
        check_config(config | {"trainer": {"strategy": "dpp"}})
    with pytest.raises(SystemExit):
        check_config(config | {"trainer": {"max_stepz": 2}})
    assert "max_stepz" in capsys.readouterr().err
    for name in ("adapter", "text_adapter"):  # PEFT finds wrong what it gets when its config is made
        adapter = {"class_path": "LoraConfig", "init_args": {"layers_pattern": "blocks"}}
        with pytest.raises(UserError, match="`layers_to_transform` must also be specified"):
            check_config(config | {"model": config["model"] | {name: adapter}})
