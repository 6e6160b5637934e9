"""Progress through the training data, for logs and other callbacks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_lora.datamodules.loading.loader import PlannedLoader
from lit_lora.datamodules.loading.restarting_loader import RestartingLoader


class DataProgress(Callback):
    """Reports the end of each chunk, and the number of bad samples.

    At the end of each visit to a chunk, on all processes, it logs a line and calls the hooks
    ``on_train_chunk_end(trainer, pl_module, chunk)`` of callbacks and ``on_train_chunk_end(chunk)`` of the module, if they are
    defined; ``chunk`` is the number of the chunk. It logs the metrics ``data/chunk``, the number of chunk visits completed in the
    whole run, if there are several chunks; and ``data/bad_samples``, the number of different bad samples in this process, if
    there are any.

    ``WebDatasetDataModule`` adds this callback to the trainer.
    """

    def __init__(self) -> None:
        self._visit = 0
        self._chunk = 0
        self._has_started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = _loader(trainer)
        if loader is not None:
            if trainer.global_step == 0 and trainer.ckpt_path is None and not self._has_started:
                _warn_of_earlier_fit(loader)
            self._has_started = True  # the tuner's short runs start again and again
            self._remember(loader)
            # Lightning does not call the start of an epoch that is gone on with.
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            _set_length(trainer, loader, done)
            if isinstance(loader, RestartingLoader):
                loader.goes_on = 0 < done < trainer.fit_loop.max_batches

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = _loader(trainer)
        if loader is not None:
            _set_length(trainer, loader, done=0)
            if isinstance(loader, RestartingLoader):
                loader.goes_on = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loader = _loader(trainer)
        if loader is None:
            return
        if loader.bad_samples:
            pl_module.log("data/bad_samples", float(len(loader.bad_samples)), batch_size=1)
        if loader.plan.num_chunks == 1:
            return
        visit = loader.plan.visit(loader.cursor)
        ended = visit > self._visit
        if visit < self._visit:  # with overfit_batches each epoch restarts
            self._remember(loader)
        pl_module.log("data/chunk", float(self._visit + ended), batch_size=1)
        if ended:
            number, chunk = self._visit, self._chunk
            self._remember(loader)
            pass_number, position = divmod(number, loader.plan.num_chunks)
            rank_zero_info(
                f"finished chunk {position + 1} of {loader.plan.num_chunks} in pass {pass_number + 1} at step"
                f" {trainer.global_step} (number {chunk} in lit-lora shards plan)"
            )
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                getattr(callback, "on_train_chunk_end", _nothing)(trainer, pl_module, chunk)
            getattr(pl_module, "on_train_chunk_end", _nothing)(chunk)

    def _remember(self, loader: PlannedLoader) -> None:
        self._visit, self._chunk = loader.plan.visit(loader.cursor), loader.plan.chunk(loader.cursor)


def add_data_progress(callbacks: list[Callback]) -> None:
    """Add a :class:`DataProgress` if there is none.

    It is inserted after the user's callbacks and before checkpoints, so that a checkpoint at the end of a chunk is saved after
    all other callbacks have run.
    """
    if not any(isinstance(callback, DataProgress) for callback in callbacks):
        checkpoints = [place for place, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)]
        callbacks.insert(min(checkpoints, default=len(callbacks)), DataProgress())


def _loader(trainer: Trainer) -> PlannedLoader | None:
    loader = trainer.train_dataloader
    return loader if isinstance(loader, PlannedLoader) else None


def _warn_of_earlier_fit(loader: PlannedLoader) -> None:
    """Warn that a new run does not begin at the beginning of the data."""
    cursor = loader.cursor
    if isinstance(loader, RestartingLoader) or cursor == loader.plan.start():
        return
    rank_zero_warn(
        f"training begins at batch {cursor.pass_batches + 1} of pass {cursor.pass_number + 1} through the data, where an earlier "
        f"fit with this datamodule ended; for a run from the beginning make a new WebDatasetDataModule"
    )


def _set_length(trainer: Trainer, loader: PlannedLoader, done: int) -> None:
    """Tell Lightning the length of an epoch, of which some batches are done. It asks for the length only once.

    A changed batch size changes it, and an epoch that ``limit_train_batches`` limits may begin in the middle of a pass.
    """
    if isinstance(loader, RestartingLoader):
        return
    limit = trainer.limit_train_batches
    # A share is one of the pass: of what is left of it, each epoch would train less, and one in the end nothing.
    limit = limit if isinstance(limit, int) else max(1, int(len(loader) * limit))
    length = min(done + loader.plan.remaining(loader.cursor), limit)
    fit_loop: Any = trainer.fit_loop
    fit_loop.max_batches = length
    fit_loop._combined_loader.limits = [length]
    if isinstance(trainer.val_check_interval, float) and trainer.check_val_every_n_epoch is not None:
        trainer.val_check_batch = max(1, int(length * trainer.val_check_interval))


def _nothing(*args: Any) -> None:
    """Default for a hook that is not defined."""
