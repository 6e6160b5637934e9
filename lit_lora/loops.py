"""Where Lightning's loops stand; what is asked of them here is not public in Lightning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_lora.errors import UserError


def accumulating(trainer: Trainer) -> bool:
    """Whether the last batch's gradients wait for those of the next one."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop._should_accumulate()


@contextmanager
def within_epoch(trainer: Trainer) -> Iterator[None]:
    """Context in which Lightning's count of epochs is as in the hooks where it saves checkpoints itself.

    After an epoch that training left early, as at ``max_steps``, the epoch counts as begun, so that a resumed run takes its
    remaining batches. After a complete one it counts as processed and not yet as completed, as in ``on_train_epoch_end``.
    """
    loop: Any = trainer.fit_loop
    names = ["completed"] if loop.epoch_loop._num_ready_batches_reached() else ["processed", "completed"]
    progress = (loop.epoch_progress.current, loop.epoch_progress.total)
    changed = [(one, name) for one in progress for name in names if getattr(one, name) == one.started]
    for one, name in changed:
        setattr(one, name, getattr(one, name) - 1)
    try:
        yield
    finally:
        for one, name in changed:
            setattr(one, name, getattr(one, name) + 1)


def number_of_steps(trainer: Trainer, what: str) -> int:
    """Number of optimizer steps of the whole training.

    Args:
        trainer: Trainer of a run that has begun.
        what: What has a schedule over the steps, for the error.

    Raises:
        UserError: If neither ``max_steps`` nor ``max_epochs`` bounds the training.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise UserError(
            f"the schedule of {what} needs the number of optimizer steps; set trainer.max_steps or trainer.max_epochs"
        )
    return int(steps)


def more_is_due(trainer: Trainer) -> bool:
    """Whether validation or the end of an epoch is due next; a resumed run would skip it."""
    loop: Any = trainer.fit_loop.epoch_loop
    return bool(loop._should_check_val_fx(trainer.fit_loop._data_fetcher) or loop._num_ready_batches_reached())
