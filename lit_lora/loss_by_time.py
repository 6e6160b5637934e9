"""Losses by quarter of the noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_lora.loops import accumulating

QUARTERS = 4


class LossByTime(Callback):
    """Logs the mean loss of the samples in each quarter of the noise schedule, as ``train/loss_q1`` to ``train/loss_q4``.

    The first quarter has the least noise. Few samples of a batch are in the same quarter, so that means over the samples of all
    processes since the last logged step are logged. Sums stay on the device: nothing waits for it at other steps. Validation
    and test log ``val/loss_q1`` and ``test/loss_q1`` at their ends, and with several loaders one for each, with the ending that
    Lightning gives ``val/loss``. A quarter without samples is not logged.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        """Sums of losses and of weights by quarter, float32 ``(2, 4)``, by the names under which they are logged."""
        self._name = ""

    def attached(self, trainer: Trainer) -> list[Callback]:
        """What the module's ``configure_callbacks`` returns: this callback, unless the trainer has it from an earlier run."""
        return [] if self in trainer.callbacks else [self]  # type: ignore[attr-defined]

    def add(self, losses: Tensor, weights: Tensor, times: Tensor) -> None:
        """Count the samples of a batch.

        Args:
            losses: Loss of each sample times its weight, ``(B,)``.
            weights: Weight of each sample, ``(B,)``.
            times: Timesteps as fractions of the schedule, from 0 for data to 1 for noise, ``(B,)``.
        """
        quarters = (times * QUARTERS).long().clamp(0, QUARTERS - 1)
        within = quarters[:, None] == torch.arange(QUARTERS, device=times.device)
        values = torch.stack([losses.detach().float(), weights.float()])[:, :, None]
        # Not a product: a loss that is NaN belongs to its own quarter alone.
        sums = torch.where(within, values, 0.0).sum(1)
        before = self._sums.get(self._name)
        self._sums[self._name] = sums if before is None else before + sums

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._name = "train/loss_q{}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0 and not accumulating(trainer):
            self._log(trainer, pl_module, "train/loss_q{}")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(_names("val", trainer.num_val_batches))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._name = _names("val", trainer.num_val_batches)[dataloader_idx]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in _names("val", trainer.num_val_batches):
            self._log(trainer, pl_module, name)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(_names("test", trainer.num_test_batches))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._name = _names("test", trainer.num_test_batches)[dataloader_idx]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in _names("test", trainer.num_test_batches):
            self._log(trainer, pl_module, name)

    def _begin(self, names: list[str]) -> None:
        for name in names:
            self._sums.pop(name, None)

    def _log(self, trainer: Trainer, module: LightningModule, names: str) -> None:
        sums = self._sums.pop(names, None)
        if sums is None:
            sums = torch.zeros(2, QUARTERS, device=module.device)
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        for number, (loss, weight) in enumerate(sums.T.tolist(), 1):
            name = names.format(number)
            if weight > 0:
                in_training = name.startswith("train")
                module.log(name, loss / weight, batch_size=1, sync_dist=not in_training, add_dataloader_idx=False)
            else:
                _forget(trainer, name)


def _names(stage: str, batches: Sequence[int | float]) -> list[str]:
    """Names under which the loaders of a stage log, with a place for the quarter's number; ``batches`` has one for each."""
    if len(batches) == 1:
        return [f"{stage}/loss_q{{}}"]
    return [f"{stage}/loss_q{{}}/dataloader_idx_{number}" for number in range(len(batches))]


def _forget(trainer: Any, name: str) -> None:
    """Lightning would log the last value of a metric again at each logged step, until the epoch ends."""
    for metric in trainer._results.values():
        if metric.meta.name == name:
            metric.reset()
