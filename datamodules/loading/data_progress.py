"""Progress in the training data, for logs and other callbacks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_lora.datamodules.loading.loader import PlannedLoader
from lit_lora.datamodules.loading.restarting_loader import RestartingLoader


class DataProgress(Callback):
    """Reports the end of each chunk, and bad samples.

    At the end of a visit to a chunk, on all processes, it calls ``on_train_chunk_end(trainer, pl_module, chunk)`` of each
    callback and ``on_train_chunk_end(chunk)`` of the module where they have such a method (``chunk`` is the chunk's
    number), and logs a line. In training it
    logs ``data/chunk``, the chunks that have been gone through so far in the whole run, where there are several; and
    ``data/bad_samples``, the different samples that were bad so far in this process, where there are any.

    ``WebDatasetDataModule`` adds it to the trainer by itself.
    """

    def __init__(self) -> None:
        self._visit = 0
        self._chunk = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = _loader(trainer)
        if loader is not None:
            self._remember(loader)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell Lightning the length of this epoch: it asks only once, and a changed batch size changes it."""
        loader = _loader(trainer)
        if loader is None or isinstance(loader, RestartingLoader):
            return
        length = loader.plan.remaining(loader.cursor)
        limit = trainer.limit_train_batches
        length = min(length, limit) if isinstance(limit, int) else int(length * limit)
        fit_loop: Any = trainer.fit_loop
        fit_loop.max_batches = length
        fit_loop._combined_loader.limits = [length]
        if isinstance(trainer.val_check_interval, float) and trainer.check_val_every_n_epoch is not None:
            trainer.val_check_batch = max(1, int(length * trainer.val_check_interval))

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
        if visit < self._visit:  # with overfit_batches each epoch goes back to the start
            self._remember(loader)
        pl_module.log("data/chunk", float(self._visit + ended), batch_size=1)
        if ended:
            number, chunk = self._visit, self._chunk
            self._remember(loader)
            pass_number, position = divmod(number, loader.plan.num_chunks)
            rank_zero_info(
                f"chunk {position + 1} of {loader.plan.num_chunks} in pass {pass_number + 1} is done"
                f" (chunk {chunk} of the plan), at step {trainer.global_step}"
            )
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                getattr(callback, "on_train_chunk_end", _nothing)(trainer, pl_module, chunk)
            getattr(pl_module, "on_train_chunk_end", _nothing)(chunk)

    def _remember(self, loader: PlannedLoader) -> None:
        self._visit, self._chunk = loader.plan.visit(loader.cursor), loader.plan.chunk(loader.cursor)


def add_data_progress(callbacks: list[Callback]) -> None:
    """Add a :class:`DataProgress` where there is none.

    It goes behind the user's callbacks and before checkpoints, so that a checkpoint at the end of a chunk finds all of them
    done with it.
    """
    if not any(isinstance(callback, DataProgress) for callback in callbacks):
        checkpoints = [place for place, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)]
        callbacks.insert(min(checkpoints, default=len(callbacks)), DataProgress())


def _loader(trainer: Trainer) -> PlannedLoader | None:
    loader = trainer.train_dataloader
    return loader if isinstance(loader, PlannedLoader) else None


def _nothing(*args: Any) -> None:
    """Stands for a hook that is not there."""
