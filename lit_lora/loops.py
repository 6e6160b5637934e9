"""Where Lightning's loops stand; what is asked of them here is not public in Lightning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn

from lit_lora.errors import UserError


def accumulating(trainer: Trainer) -> bool:
    """Whether the last batch's gradients wait for those of the next one."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop._should_accumulate()


def begins_anew(trainer: Trainer) -> bool:
    """Whether a fit that is set up begins with its first step or a checkpoint, and not where the trainer's last fit has ended."""
    return trainer.global_step == 0 or trainer.ckpt_path is not None


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
    """Whether validation or the end of an epoch comes before the next batch; a run resumed from here would skip it."""
    fit_loop: Any = trainer.fit_loop
    loop = fit_loop.epoch_loop
    in_batch = loop.batch_progress.current.completed < loop.batch_progress.current.processed
    in_epoch = fit_loop.epoch_progress.current.processed < fit_loop.epoch_progress.current.started
    validates = not _validates_by_clock(trainer) and loop._should_check_val_fx(fit_loop._data_fetcher)
    return (in_batch and validates) or (in_epoch and loop._num_ready_batches_reached())


def validated_in_epoch(trainer: Trainer) -> bool:
    """Whether the validation that ends came between two steps of an epoch, at the same step in all processes."""
    in_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return in_fit and not _validates_by_clock(trainer) and not trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def _validates_by_clock(trainer: Trainer) -> bool:
    """Whether validation is due by the clock, about which processes may differ."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def never_validates(trainer: Trainer) -> str | None:
    """Why no validation comes before the end of a training that begins, with what to set; None if one may come.

    A resumed run counts what it was resumed from.

    Args:
        trainer: Trainer with its loaders, as from ``on_train_start`` on.
    """
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches is 0: set it to 1.0, or give no validation data"
    fit_loop: Any = trainer.fit_loop
    batches, every = fit_loop.max_batches, trainer.val_check_batch
    if every is None or math.inf in (batches, every):  # by the clock, or in an epoch of unknown length
        return None
    whole, rest = divmod(trainer.max_steps, math.ceil(batches / trainer.accumulate_grad_batches))
    of_steps = whole * batches + rest * trainer.accumulate_grad_batches if trainer.max_steps >= 0 else math.inf
    end = min(of_steps, math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs * batches)
    epochs = trainer.check_val_every_n_epoch
    first = every if epochs is None else (epochs - 1) * batches + every
    if first <= end:
        return None
    return (
        f"training ends after {end:,} batches, and the first validation would come after {first:,} "
        f"(val_check_interval={trainer.val_check_interval}, check_val_every_n_epoch={epochs}): set trainer.val_check_interval to "
        f"at most {min(end, batches):,}" + (", and check_val_every_n_epoch to 1" if epochs not in (None, 1) else "")
    )


def is_over(trainer: Trainer) -> bool:
    """Whether the last step of the training was taken, so that the run ends by itself."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def passes_in(steps: int, batches: int, accumulate: int) -> float:
    """Passes through the data in a number of optimizer steps, none of which spans two passes.

    Args:
        steps: Number of optimizer steps.
        batches: Batches of each process in a pass.
        accumulate: Batches of each process in a step.
    """
    return steps / math.ceil(batches / accumulate)


def resume_epoch(trainer: Trainer) -> bool:
    """Make Lightning go on where a checkpoint was saved; to be called in ``on_train_start``, with the metrics restored.

    A checkpoint that was saved after the last batch of an epoch begins the next epoch. Lightning by itself takes that one for
    the same epoch, counts one too many and leaves out ``on_train_epoch_start``; with ``max_epochs`` it trains an epoch less.
    Plateau schedulers take the step that was due after the checkpoint was saved, and gradients are accumulated over as many
    batches as ``GradientAccumulationScheduler`` has for the epoch.

    Returns:
        Whether an epoch begins, so that :func:`begin_pass` must be called in its ``on_train_epoch_start``.
    """
    fit_loop: Any = trainer.fit_loop
    loop = fit_loop.epoch_loop
    if not fit_loop.is_resuming:
        return False
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):  # it looks at the epoch in on_train_epoch_start alone
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
    if loop.val_loop.restarted_mid_evaluation:
        return False
    fit_loop._restarting = False  # else plateau schedulers would miss the end of this epoch
    if not loop._num_ready_batches_reached():
        if loop.restarted_on_train_batch_end:
            loop.update_lr_schedulers("step", update_plateau_schedulers=True)
        return False
    epochs = (fit_loop.epoch_progress.current, fit_loop.epoch_progress.total)
    for progress in epochs:
        progress.ready = progress.processed = progress.started
        progress.completed = progress.started - 1
    if not fit_loop.restarted_on_epoch_start:
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    for progress in epochs:
        progress.completed = progress.started
    fit_loop.reset_restart_stage()
    loop.restarting = False
    return True


def begin_pass(trainer: Trainer) -> None:
    """Begin a pass through the training data, for an epoch that follows the one that the loaded checkpoint had completed."""
    fit_loop: Any = trainer.fit_loop
    loader, fetcher = fit_loop._combined_loader, fit_loop._data_fetcher
    if fit_loop._combined_loader_states_to_load:
        loader._load_state_dicts(fit_loop._combined_loader_states_to_load)
        fit_loop._combined_loader_states_to_load = []
    iter(fetcher)  # again: samplers know the epoch only now, and random numbers are restored
    if fetcher.length is None:  # a batch is fetched ahead, or there was none
        if fetcher.done:
            iter(fetcher)
    else:
        fetcher.iterator = _pass(loader)


def _pass(loader: Any) -> Iterator[Any]:
    """The batches of a pass; a loader whose state says that it has given all batches may have none the first time."""
    given = False
    while True:
        try:
            batch = next(loader)
        except StopIteration:
            if given:
                return
            iter(loader)
            given = True
        else:
            given = True
            yield batch
