"""The folder of a run's own files."""

from __future__ import annotations

import os

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
