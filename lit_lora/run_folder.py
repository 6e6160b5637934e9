"""The folder of a run's own files."""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: Trainer) -> str:
    """Folder for what a run writes beside its logs, equal on all processes; a collective call, for ``setup`` hooks and later.

    It is that in which ``ModelCheckpoint`` makes ``checkpoints``: for TensorBoard and CSV the logger's ``version_N``, for other
    loggers, as of Weights & Biases and MLflow, ``save_dir/NAME/VERSION``. Their ``save_dir``, which is ``trainer.log_dir``, is
    that of all runs. Without a logger it is ``default_root_dir``.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    logger = trainer.logger
    if logger is not None and not isinstance(logger, TensorBoardLogger | CSVLogger):
        # Only the first process has a run of the logger.
        own = [str(logger.name), str(logger.version)] if trainer.is_global_zero else []
        folder = os.path.join(folder, *trainer.strategy.broadcast(own))
    return folder


def why_none_is_last(trainer: Trainer) -> str:
    """Where no checkpoint to resume from was found, and why."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folder = next((str(folder) for folder in folders if folder), None)
    searched = Path(folder or trainer.log_dir or trainer.default_root_dir)
    has_versions = folder is None and isinstance(trainer.logger, TensorBoardLogger | CSVLogger)
    if has_versions:  # the log folder is this run's own, and new
        searched = searched.parent / "version_*" / "checkpoints"
    links = [Path(found) for found in sorted(glob(str(searched / "*.ckpt")), reverse=True)]
    dangling = [link for link in links if link.is_symlink() and not link.exists()]
    if dangling:
        return f"{dangling[0]} points to {os.readlink(dangling[0])}, which is gone"
    found = f"there is no checkpoint to resume from in {searched}"
    if folder is None and getattr(trainer, "fast_dev_run", False):
        found += "; trainer.fast_dev_run has no logger, in whose folders the checkpoints of runs are: give the checkpoint's path"
    elif folder is None and trainer.logger and not has_versions:
        found += f", where {type(trainer.logger).__name__} gives each run a folder of its own: set AdapterCheckpoint's dirpath"
    return found
