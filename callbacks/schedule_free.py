"""Schedule-free optimizers, whose weights to train are not the weights to use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class ScheduleFree(Callback):
    """Gives schedule-free optimizers their two sets of weights, for any LightningModule (Defazio et al., 2024).

    Such an optimizer computes gradients at other weights than those that it has learned, and has ``train()`` and ``eval()`` to
    exchange them. This callback calls ``eval()`` before validation and at the end of training, and ``train()`` before training
    goes on. :class:`AdapterCheckpoint` saves, and :class:`SampleImages` draws with, the learned weights; a resumed run is bit for
    bit that of a run that has saved at the same step. Other optimizers are left alone.

    ``lit-lora fit`` adds this callback by default. :class:`AdapterEMA` has no use beside it and warns: the learned weights are an
    average already.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _set_mode(trainer, training=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _set_mode(trainer, training=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:  # otherwise training does not go on
            _set_mode(trainer, training=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _set_mode(trainer, training=False)


@contextmanager
def learned_weights(trainer: Trainer) -> Iterator[None]:
    """Context in which the module has the weights that schedule-free optimizers have learned; nothing else changes."""
    training = [optimizer for optimizer in schedule_free_optimizers(trainer) if _trains(optimizer)]
    for optimizer in training:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in training:
            optimizer.train()


def _set_mode(trainer: Trainer, training: bool) -> None:
    for optimizer in schedule_free_optimizers(trainer):
        (optimizer.train if training else optimizer.eval)()


def _trains(optimizer: Any) -> bool:
    return any(group.get("train_mode") for group in optimizer.param_groups)


def schedule_free_optimizers(trainer: Trainer) -> Iterator[Any]:
    """The run's optimizers that have the two modes."""
    for optimizer in trainer.optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)  # Lightning's or DeepSpeed's wrapper
        if any("train_mode" in group for group in optimizer.param_groups) and hasattr(inner, "eval"):
            yield inner
