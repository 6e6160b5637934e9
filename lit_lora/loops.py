"""Where Lightning's loops stand; what is asked of them here is not public in Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn


def accumulating(trainer: Trainer) -> bool:
    """Whether the last batch's gradients wait for those of the next one."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop._should_accumulate()


@contextmanager
def within_epoch(trainer: Trainer) -> Iterator[None]:
    """Context in which an epoch that training left early counts as begun, so that a resumed run takes its remaining batches.

    Lightning counts such an epoch as complete.
    """
    loop: Any = trainer.fit_loop
    changed = []
    if not loop.epoch_loop._num_ready_batches_reached():
        for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
            changed += [(progress, n) for n in ("processed", "completed") if getattr(progress, n) == progress.started]
    for progress, name in changed:
        setattr(progress, name, getattr(progress, name) - 1)
    try:
        yield
    finally:
        for progress, name in changed:
            setattr(progress, name, getattr(progress, name) + 1)


def more_is_due(trainer: Trainer) -> bool:
    """Whether validation or the end of an epoch is due next; a resumed run would skip it."""
    loop: Any = trainer.fit_loop.epoch_loop
    return bool(loop._should_check_val_fx(trainer.fit_loop._data_fetcher) or loop._num_ready_batches_reached())
