"""A run that goes on from any checkpoint counts epochs, validates and sets the learning rate as if it had never stopped."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset

from lit_lora.callbacks import AdapterCheckpoint, Preemption
from lit_lora.datamodules import Chunks, WebDatasetDataModule
from tests.callbacks.number_loaders import Keeping, Numbers

pytestmark = pytest.mark.filterwarnings("ignore:.*dirpath has changed")

EPOCH = 4
"""Batches of an epoch."""


class Line(LightningModule):
    """Notes what the trainer does; the metrics never improve, so that plateau schedulers count."""

    def __init__(self, scheduler: str = "epoch") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 1)
        self.scheduler = scheduler
        self.events: list[tuple[Any, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.events.append(("step", self.current_epoch, batch_idx))
        self.log("loss", 1.0, batch_size=2)
        numbers = batch["pixel_values"].float().mean((2, 3)) / 255 if isinstance(batch, dict) else batch
        return self.line(numbers).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 1.0, batch_size=2)
        self.events.append(("validation", self.current_epoch, self.global_step, batch_idx))

    def on_train_epoch_start(self) -> None:
        self.events.append(("epoch starts", self.current_epoch))

    def on_train_epoch_end(self) -> None:
        self.events.append(("epoch ends", self.current_epoch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedulers: dict[str, dict[str, Any]] = {
            "epoch": {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"},
            "step": {"scheduler": StepLR(optimizer, 3, 0.5), "interval": "step"},
            "plateau": {"scheduler": ReduceLROnPlateau(optimizer, patience=1), "monitor": "val/loss"},
            "plateau of steps": {
                "scheduler": ReduceLROnPlateau(optimizer, patience=3),
                "monitor": "loss",
                "interval": "step",
            },
        }
        return {"optimizer": optimizer, "lr_scheduler": schedulers[self.scheduler]}


class KeepAll(AdapterCheckpoint):
    """Keeps a numbered copy of everything that it saves, also of what it replaces."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **{"save_top_k": -1, "filename": "{step}"} | options)
        self.copies = folder / "copies"

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.copies.mkdir(exist_ok=True)
        shutil.copy(filepath, self.copies / f"{trainer.global_step:02}-{len(list(self.copies.iterdir())):02}.ckpt")

    def saved(self) -> list[Path]:
        return sorted(self.copies.iterdir()) if self.copies.exists() else []


@pytest.fixture
def fit(trainer_options: dict[str, Any]) -> Callable[..., tuple[Line, KeepAll]]:
    def run(
        folder: Path,
        *callbacks: Callback,
        resume: Path | None = None,
        scheduler: str = "epoch",
        saves: dict[str, Any] | None = None,
        data: Any = None,
        **options: Any,
    ) -> tuple[Line, KeepAll]:
        torch.manual_seed(0)
        module = Line(scheduler)
        checkpoints = KeepAll(folder, **saves or {"every_n_train_steps": 1})
        always = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "callbacks": [*callbacks, checkpoints]}
        trainer = Trainer(**trainer_options | always | options)
        if data is None:
            data = Keeping(Numbers(2 * EPOCH), batch_size=2)
        if isinstance(data, WebDatasetDataModule):
            trainer.fit(module, data, ckpt_path=resume)
        else:
            trainer.fit(module, data, DataLoader(Numbers(4), batch_size=2), ckpt_path=resume)
        return module, checkpoints

    return run


def state_of(path: Path) -> dict[str, Any]:
    """Counters, schedule, weights and metrics of a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    names = ("epoch", "global_step", "loops", "lr_schedulers")
    weights = {name: value.tolist() for name, value in checkpoint["state_dict"].items()}
    metrics = {name: float(value) for name, value in checkpoint["lit_lora"]["metrics"].items()}
    return {name: checkpoint[name] for name in names} | {"weights": weights, "metrics": metrics}


def assert_goes_on(fit: Callable[..., tuple[Line, KeepAll]], folder: Path, data: Any = None, **options: Any) -> None:
    """Every later checkpoint and event of a run is the same when it is resumed from any of its checkpoints."""
    make = data or (lambda: None)
    whole, checkpoints = fit(folder / "whole", data=make(), **options)
    saved = checkpoints.saved()
    assert len(saved) > 1
    states = {path.name[:2]: state_of(path) for path in saved}  # of the last save at each step
    for number, path in enumerate(saved):
        resumed, later = fit(folder / path.stem, resume=path, data=make(), **options)
        expected = {step: state for step, state in states.items() if step > path.name[:2]}
        got = {path.name[:2]: path for path in later.saved()}
        assert got.keys() == expected.keys(), f"resumed from save {number}"
        for step in expected:
            assert state_of(got[step]) == expected[step], f"resumed from {path.name}, at step {step}"
        assert resumed.events == whole.events[len(whole.events) - len(resumed.events) :], f"resumed from {path.name}"


NO_VALIDATION = {"limit_val_batches": 0}
WITHIN = {"val_check_interval": 3, "check_val_every_n_epoch": None}
STEPS = {"max_steps": 3 * EPOCH + 1}
EPOCHS = {"max_steps": -1, "max_epochs": 3}


@pytest.mark.parametrize("end", [STEPS, EPOCHS], ids=["max_steps", "max_epochs"])
@pytest.mark.parametrize(
    ("saves", "scheduler", "options"),
    [
        ({"every_n_train_steps": 1}, "epoch", NO_VALIDATION),
        ({"every_n_train_steps": 1, "save_last": True}, "plateau", {}),
        ({"every_n_train_steps": 1}, "plateau of steps", {"val_check_interval": 2}),
        ({"every_n_train_steps": 1}, "step", WITHIN | {"accumulate_grad_batches": 3}),
        ({"monitor": "val/loss"}, "epoch", WITHIN),
        ({"monitor": "val/loss", "every_n_train_steps": 2}, "epoch", {"check_val_every_n_epoch": 2}),
        ({"every_n_epochs": 1}, "plateau", {"val_check_interval": 2}),
        ({"save_on_train_epoch_end": True}, "epoch", NO_VALIDATION),
    ],
)
def test_a_run_goes_on_from_every_checkpoint(
    saves: dict[str, Any],
    scheduler: str,
    options: dict[str, Any],
    end: dict[str, Any],
    fit: Callable[..., tuple[Line, KeepAll]],
    tmp_path: Path,
) -> None:
    assert_goes_on(fit, tmp_path, saves=saves, scheduler=scheduler, **options, **end)


@pytest.mark.parametrize("options", [NO_VALIDATION, {"val_check_interval": 2}])
def test_gradients_are_accumulated_over_as_many_batches_as_the_epoch_has(
    options: dict[str, Any], fit: Callable[..., tuple[Line, KeepAll]], tmp_path: Path
) -> None:
    def accumulating(folder: Path, **others: Any) -> tuple[Line, KeepAll]:
        return fit(folder, GradientAccumulationScheduler({1: 3, 2: 2}), **others)

    assert_goes_on(accumulating, tmp_path, **options, **EPOCHS)
    _, checkpoints = fit(tmp_path / "first", GradientAccumulationScheduler({1: 3}), **options, **EPOCHS)
    resumed = {"resume": checkpoints.saved()[-2], **options, **EPOCHS}
    with pytest.warns(
        UserWarning, match=r"scheduling of GradientAccumulationScheduler .*1: 3.* in the checkpoint, .*1: 2"
    ):
        fit(tmp_path / "second", GradientAccumulationScheduler({1: 2}), **resumed)


class Pass(IterableDataset[Tensor]):
    """A stream without a length that keeps its position."""

    def __init__(self) -> None:
        self.given = self.taken = 0

    def __iter__(self) -> Iterator[Tensor]:
        taken, self.taken = self.taken, 0
        for self.given in range(taken + 1, 2 * EPOCH + 1):
            yield torch.full((3,), float(self.given))


class Stream(DataLoader[Tensor]):
    def __init__(self) -> None:
        super().__init__(Pass(), batch_size=2)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.dataset.given}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.dataset.taken = state["given"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", [STEPS, EPOCHS], ids=["max_steps", "max_epochs"])
def test_shuffled_loaders_without_a_position_and_streams_without_a_length_go_on_at_the_end_of_an_epoch(
    end: dict[str, Any], fit: Callable[..., tuple[Line, KeepAll]], tmp_path: Path
) -> None:
    saves = {"save_on_train_epoch_end": True}

    def shuffled() -> DataLoader[Tensor]:
        return DataLoader(Numbers(2 * EPOCH), batch_size=2, shuffle=True)

    assert_goes_on(fit, tmp_path / "shuffled", data=shuffled, saves=saves, **end, **NO_VALIDATION)
    assert_goes_on(fit, tmp_path / "stream", data=Stream, saves=saves, **end, **NO_VALIDATION)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("end", [STEPS, EPOCHS], ids=["max_steps", "max_epochs"])
def test_a_run_on_shards_goes_on_from_every_checkpoint(
    end: dict[str, Any],
    chunks: int,
    fit: Callable[..., tuple[Line, KeepAll]],
    make_shards: Callable[..., list[Path]],
    tmp_path: Path,
) -> None:
    make_shards(6, 6, 6)

    def data() -> WebDatasetDataModule:
        options: dict[str, Any] = {"batch_size": 2, "resolution": 16, "val_samples": 2, "chunks": Chunks(chunks)}
        return WebDatasetDataModule(str(tmp_path / "shards"), num_workers=0, **options)

    every = {"every_n_train_steps": 1} if chunks == 1 else {"every_n_train_steps": 100, "save_on_chunk_end": True}
    assert_goes_on(fit, tmp_path, data=data, saves=every | {"save_last": True}, **WITHIN, **end)


class StopEachTime(Callback):
    """Sends this process the signal of a preemption in each of its runs, in a batch of its first epoch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.batch -= 1
        if self.batch == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("batches", [1, EPOCH])
@pytest.mark.parametrize("within", [1, 2, 3])
@pytest.mark.parametrize("scheduler", ["epoch", "plateau"])
def test_a_run_that_is_preempted_again_and_again_ends_as_if_it_never_was(
    scheduler: str, within: int, batches: int, fit: Callable[..., tuple[Line, KeepAll]], tmp_path: Path
) -> None:
    """Epochs of one batch, too: each of their steps is the last of an epoch."""

    def data() -> Keeping:
        return Keeping(Numbers(2 * batches), batch_size=2)

    options: dict[str, Any] = {"scheduler": scheduler, "max_steps": 13, "saves": {"every_n_train_steps": 100}}
    whole, checkpoints = fit(tmp_path / "whole", data=data(), **options)
    events: list[tuple[Any, ...]] = []
    resume: Path | None = None
    stops = 0
    for _ in range(14):
        try:
            _, later = fit(
                tmp_path / "stopped",
                Preemption(),
                StopEachTime(within),
                Collect(events),
                data=data(),
                resume=resume,
                **options,
            )
            break
        except SIGTERMException:
            stops += 1
            resume = tmp_path / "stopped" / "last.ckpt"
    assert stops > 3
    assert events == whole.events
    assert state_of(later.saved()[-1]) == state_of(checkpoints.saved()[-1])


class Collect(Callback):
    """Gathers the events of several runs, also of those that are stopped."""

    def __init__(self, events: list[tuple[Any, ...]]) -> None:
        self.events = events

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.events.extend(pl_module.events)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.events.extend(pl_module.events)


@pytest.mark.parametrize("options", [NO_VALIDATION, {}, {"val_check_interval": 2}, {"accumulate_grad_batches": 3}])
def test_a_run_that_max_steps_ends_goes_on_with_more_steps(
    options: dict[str, Any], fit: Callable[..., tuple[Line, KeepAll]], tmp_path: Path
) -> None:
    """At every step; what a step at the end of the run was too early for, such as validation, is not made up for."""
    _, checkpoints = fit(tmp_path / "whole", max_steps=9, **options)
    expected = {path.name[:2]: state_of(path) for path in checkpoints.saved()}
    resume = None
    for steps in range(1, 10):
        _, later = fit(tmp_path / "parts", resume=resume, max_steps=steps, **options)
        resume = later.saved()[-1]
    for path in later.saved():
        assert state_of(path) == expected[path.name[:2]], path.name
