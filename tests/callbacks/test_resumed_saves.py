"""A run that is resumed in another folder tells of a better checkpoint in the folder before."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_lora.callbacks import AdapterCheckpoint
from tests.helpers import loader_of

BATCHES: Any = [torch.ones(1)] * 8


class Scored(LightningModule):
    """Its validations log the given scores, by the step."""

    def __init__(self, scores: Sequence[float]) -> None:
        super().__init__()
        self.weight, self.scores = nn.Parameter(torch.zeros(1)), scores

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("score", self.scores[self.global_step - 1], batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, options: dict[str, Any], scores: Sequence[float], steps: int, resume: Path | None = None) -> str:
    """The warnings of a run about its best checkpoint."""
    saving = AdapterCheckpoint(folder, monitor="score", mode="max", save_last=True, filename="{step}")
    options = options | {"enable_checkpointing": True, "callbacks": [saving], "num_sanity_val_steps": 0}
    trainer = Trainer(**options | {"max_steps": steps, "val_check_interval": 1, "limit_val_batches": 1})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Scored(scores), loader_of(BATCHES), loader_of(BATCHES), ckpt_path=resume)
    return " ".join(str(one.message) for one in caught if "the best score" in str(one.message))


@pytest.mark.parametrize(("third", "told"), [(0.5, True), (0.9, False)])
def test_the_best_checkpoint_is_in_an_earlier_folder(
    third: float, told: bool, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    scores = [0.2, 0.7, 0.1, third, 0.3]
    assert fit(tmp_path / "a", trainer_options, scores, 2) == ""
    said = fit(tmp_path / "b", trainer_options, scores, 3, tmp_path / "a" / "last.ckpt")
    assert f"is 0.7, that of {tmp_path / 'a' / 'step=2.ckpt'}, saved before" in said
    assert f"since then it is 0.1, that of {tmp_path / 'b' / 'step=3.ckpt'}" in said
    said = fit(tmp_path / "b", trainer_options, scores, 4, tmp_path / "b" / "last.ckpt")
    assert ("is 0.7" in said) == told
    said = fit(tmp_path / "c", trainer_options, scores, 5, tmp_path / "b" / "last.ckpt")
    best = tmp_path / "a" / "step=2.ckpt" if told else tmp_path / "b" / "step=4.ckpt"
    assert f"is {max(scores[:4]):.4g}, that of {best}, saved before" in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"max_steps": 2},
            "the run began at step 2, and trainer.max_steps=2 is not above that; raise it",
        ),
        (
            {"max_steps": 1},
            "the run began at step 2, and trainer.max_steps=1 is not above that; raise it",
        ),
        (
            {"max_epochs": 0},
            "the run began after 0 epochs, and trainer.max_epochs=0 is not above that; raise it",
        ),
        ({"limit_train_batches": 0, "max_steps": 9}, "trainer.limit_train_batches is 0"),
        (
            {"max_steps": 9, "max_time": "00:00:00:00"},
            "a callback stopped the run before its first step, as trainer.max_time does once its time is used up",
        ),
        ({"max_steps": 3}, None),
    ],
)
def test_a_run_that_trains_nothing_says_why(
    options: dict[str, Any],
    reason: str | None,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fit(tmp_path / "a", trainer_options, [0.1, 0.2], 2)
    caplog.clear()
    saving = AdapterCheckpoint(tmp_path / "a", monitor="score", mode="max", save_last=True)
    options = {"num_sanity_val_steps": 0, "enable_checkpointing": True, "callbacks": [saving]} | options
    trainer = Trainer(**trainer_options | options)
    resume = None if "max_epochs" in options else tmp_path / "a" / "last.ckpt"
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(Scored([0.1] * 9), loader_of(BATCHES), loader_of(BATCHES), ckpt_path=resume)
    told = [record.message for record in caplog.records if "nothing was trained" in record.message]
    assert told == ([] if reason is None else [f"nothing was trained: {reason}"])


def test_a_resumed_run_saves_at_the_steps_of_one_that_was_not(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def run(folder: Path, steps: int) -> None:
        saving = AdapterCheckpoint(folder, save_top_k=-1, save_last="link", every_n_train_steps=2, filename="{step}")
        options = trainer_options | {"enable_checkpointing": True, "callbacks": [saving], "accumulate_grad_batches": 2}
        trainer = Trainer(**options | {"max_steps": steps})
        last = str(folder / "last.ckpt") if folder.exists() else None
        trainer.fit(Scored([0.0]), loader_of(BATCHES), ckpt_path=last)

    run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 4)
    run(tmp_path / "parts", 8)
    found = [sorted(path.name for path in (tmp_path / name).glob("*.ckpt")) for name in ("whole", "parts")]
    assert found[0] == found[1] == ["last.ckpt", *(f"step={step}.ckpt" for step in (2, 4, 6, 8))]


@pytest.mark.parametrize("monitor", ["score", None])
def test_a_second_fit_with_the_same_callback_saves_what_a_new_one_would(
    monitor: str | None, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Its steps are those of the first, and its scores are worse."""
    saving = AdapterCheckpoint(monitor=monitor, mode="max", filename="{step}", every_n_train_steps=2)
    options: dict[str, Any] = trainer_options | {"enable_checkpointing": True, "callbacks": [saving], "max_steps": 2}
    options |= {"num_sanity_val_steps": 0, "val_check_interval": 1, "limit_val_batches": 1}
    for number, score in enumerate([0.9, 0.1]):
        trainer = Trainer(**options | {"default_root_dir": tmp_path / str(number)})
        trainer.fit(Scored([score] * 2), loader_of(BATCHES), loader_of(BATCHES))
    paths = [tmp_path / str(number) / "checkpoints" / "step=2.ckpt" for number in range(2)]
    assert all(path.exists() for path in paths)
    assert saving.best_model_path == str(paths[1])
    assert monitor is None or saving.best_model_score == pytest.approx(0.1)
    # The same trainer goes on from an earlier step with a checkpoint, and saves again at one that it has saved at.
    paths[1].rename(tmp_path / "two.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = 4
    for _ in range(2):
        trainer.fit(Scored([0.5] * 4), loader_of(BATCHES), loader_of(BATCHES), ckpt_path=tmp_path / "two.ckpt")
        last = tmp_path / "1" / "checkpoints" / "step=4.ckpt"
        assert last.exists()
        last.unlink()
