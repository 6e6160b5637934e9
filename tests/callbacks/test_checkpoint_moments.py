"""When AdapterCheckpoint saves, and that every checkpoint resumes exactly."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_lora.callbacks import AdapterCheckpoint
from tests.callbacks.number_loaders import Keeping, Numbers, Rest


class Line(LightningModule):
    """Its validation loss only grows, so that the first checkpoint stays the best."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.line(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", float(self.trainer.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class StopAtBatch(Callback):
    """Asks for the end of training as a Timer does."""

    def __init__(self, batch: int, in_validation: bool = False) -> None:
        self.batch, self.in_validation = batch, in_validation

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer.should_stop |= not self.in_validation and trainer.fit_loop.total_batch_idx + 1 >= self.batch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop |= self.in_validation


class UsedUp(Timer):
    """A timer whose time is over after a number of batches."""

    def __init__(self, batches: int) -> None:
        super().__init__(timedelta(days=1))
        self.batches = batches

    def on_fit_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._offset = 0
        super().on_fit_start(trainer, *args, **kwargs)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 >= self.batches:
            self._offset = 1e9
        super().on_train_batch_end(trainer, *args, **kwargs)


def fit(
    folder: Path,
    options: dict[str, Any],
    *callbacks: Callback,
    resume: Path | None = None,
    checkpoint: dict[str, Any] | None = None,
    **trainer: Any,
) -> Line:
    module = Line()
    checkpoints = AdapterCheckpoint(folder, enable_version_counter=False, **checkpoint or {})
    options = (
        options | {"enable_checkpointing": True, "max_epochs": -1, "max_steps": -1, "num_sanity_val_steps": 0} | trainer
    )
    loaders = DataLoader(Numbers(16), batch_size=2), DataLoader(Numbers(2))
    Trainer(**options | {"callbacks": [*callbacks, checkpoints]}).fit(module, *loaders, ckpt_path=resume)
    return module


def step_of(path: Path) -> int:
    step: int = torch.load(path, weights_only=True)["global_step"]
    return step


ENDS: dict[str, tuple[dict[str, Any], list[Callback], int]] = {
    "max_steps": ({"max_steps": 5}, [], 5),
    "max_steps, within an epoch that validates": ({"max_steps": 5, "val_check_interval": 2}, [], 5),
    "max_epochs": ({"max_epochs": 1}, [], 8),
    "max_epochs, accumulating": ({"max_epochs": 1, "accumulate_grad_batches": 3}, [], 3),
    "should_stop": ({}, [StopAtBatch(6)], 6),
    "should_stop, accumulating": ({"accumulate_grad_batches": 4}, [StopAtBatch(6)], 2),
    "should_stop in validation": ({"val_check_interval": 5}, [StopAtBatch(0, in_validation=True)], 5),
    "should_stop in validation, accumulating": (
        {"val_check_interval": 5, "accumulate_grad_batches": 4},
        [StopAtBatch(0, in_validation=True)],
        2,
    ),
    "max_time, accumulating": ({"accumulate_grad_batches": 4}, [UsedUp(6)], 2),
}


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("end", ENDS)
def test_every_normal_end_leaves_last_at_the_last_step(
    end: str, save_last: Any, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    options, callbacks, steps = ENDS[end]
    triggers = {"every_n_train_steps": 4, "save_last": save_last}
    module = fit(tmp_path, trainer_options, *callbacks, checkpoint=triggers, **options)
    assert module.trainer.global_step == steps
    assert step_of(tmp_path / "last.ckpt") == steps


def test_the_end_is_saved_without_save_last_too(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    fit(tmp_path, trainer_options, checkpoint={"every_n_train_steps": 4}, max_steps=5)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-step=5.ckpt"]


def test_nothing_is_saved_where_nothing_was_trained(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    fit(tmp_path / "a", trainer_options, checkpoint={"save_last": True}, max_steps=5)
    resume = tmp_path / "a" / "last.ckpt"
    with pytest.warns(UserWarning, match="dirpath has changed"):
        fit(tmp_path / "b", trainer_options, checkpoint={"save_last": True}, max_steps=5, resume=resume)
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("trigger", [{}, {"every_n_train_steps": 2}, {"train_time_interval": timedelta(0)}])
def test_last_is_the_newest_where_the_metric_gets_worse(
    trigger: dict[str, Any], save_last: Any, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    best = {"monitor": "val/loss", "mode": "min", "save_top_k": 1}
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if (tmp_path / "last.ckpt").exists():
                seen.append((trainer.global_step, step_of(tmp_path / "last.ckpt")))

    fit(
        tmp_path,
        trainer_options,
        Look(),
        checkpoint={**best, **trigger, "save_last": save_last},
        max_steps=8,
        val_check_interval=2,
    )
    assert step_of(tmp_path / "last.ckpt") == 8
    assert [path.name for path in tmp_path.glob("*step*.ckpt")] == ["epoch=0-step=2.ckpt"]
    assert seen
    assert all(last >= step - 1 for step, last in seen)


def test_fast_dev_run_writes_nothing(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    triggers = {"every_n_train_steps": 1, "save_last": True}
    fit(tmp_path, trainer_options, checkpoint=triggers, max_steps=3)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    fit(tmp_path, trainer_options, checkpoint=triggers, fast_dev_run=True)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


MIDDLES: dict[str, tuple[dict[str, Any], dict[str, Any], list[Callback], int]] = {
    "validation": ({"monitor": "val/loss", "save_top_k": -1}, {"val_check_interval": 4}, [], 6),
    "time": ({"train_time_interval": timedelta(0), "save_top_k": -1}, {}, [], 3),
    "stop": ({"save_last": True}, {}, [StopAtBatch(4)], 6),
    "stop in validation": (
        {"monitor": "val/loss", "save_last": True},
        {"val_check_interval": 4},
        [StopAtBatch(0, in_validation=True)],
        6,
    ),
    "max_steps": ({"save_last": True}, {"max_steps": 2}, [], 6),
    "the end of an epoch that max_steps left": ({}, {"max_steps": 2}, [], 6),
}


@pytest.mark.parametrize("trigger", MIDDLES)
def test_what_is_due_between_accumulated_batches_resumes_exactly(
    trigger: str, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint, options, callbacks, batches = MIDDLES[trigger]
    steps = {"accumulate_grad_batches": 3, "max_steps": 5}
    whole = fit(tmp_path / "whole", trainer_options, **steps)
    fit(tmp_path / "first", trainer_options, *callbacks, checkpoint=checkpoint, **steps | options)
    middle = sorted((tmp_path / "first").glob("*.ckpt"))[0]
    state = torch.load(middle, weights_only=True)
    assert state["global_step"] == batches // 3
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == batches

    module = Line()
    options = trainer_options | {"enable_checkpointing": True, "max_epochs": -1, "num_sanity_val_steps": 0} | steps
    trainer = Trainer(**options | {"callbacks": [AdapterCheckpoint(tmp_path / "first", **checkpoint)]})
    loader = Rest(Numbers(16), batch_size=2)
    loader.taken = batches
    trainer.fit(module, loader, DataLoader(Numbers(2)), ckpt_path=middle)
    assert trainer.current_epoch == whole.trainer.current_epoch
    assert torch.equal(module.line.weight, whole.line.weight)


@pytest.mark.filterwarnings("ignore:.*ended before the epoch ended")
@pytest.mark.parametrize(
    ("loader", "steps", "exact"),
    [(DataLoader, 5, False), (Keeping, 5, True), (Keeping, 8, True)],
)
def test_what_the_docs_promise_for_each_kind_of_loader(
    loader: type[DataLoader[Tensor]], steps: int, exact: bool, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Eight batches are an epoch: loaders that keep their position resume exactly, at its end too, others repeat samples."""

    def run(max_steps: int, resume: Path | None = None) -> Line:
        module = Line()
        checkpoints = AdapterCheckpoint(tmp_path / "ck", save_last=True, enable_version_counter=False)
        options = trainer_options | {"enable_checkpointing": True, "max_steps": max_steps, "limit_val_batches": 0}
        trainer = Trainer(**options | {"max_epochs": -1, "callbacks": [checkpoints]})
        trainer.fit(module, loader(Numbers(16), batch_size=2), ckpt_path=resume)
        return module

    whole = run(12)
    run(steps)
    resumed = run(12, tmp_path / "ck" / "last.ckpt")
    assert torch.equal(resumed.line.weight, whole.line.weight) == exact
