"""Callbacks for runs of several processes that tests watch and disturb."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Diary(Callback):
    """Writes a line for each batch of a process: the number of the process and the keys that count; and takes its time.

    Args:
        folder: Where ``PID.diary`` of each process comes.
        pause: Seconds before a batch, so that a test can come in between.
    """

    def __init__(self, folder: str, pause: float = 0.0) -> None:
        self.path = Path(folder) / f"{os.getpid()}.diary"
        self.pause = pause

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(self.pause)
        with self.path.open("a") as diary:
            keys = [key for key, weight in zip(batch["key"], batch["weight"], strict=True) if weight]
            print(trainer.global_rank, *keys, file=diary)


class StopOnce(Callback):
    """Ends a run after a step, unless it was resumed.

    Args:
        step: The step.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.ckpt_path is None:
            trainer.should_stop = True


class Fault(Callback):
    """One process raises before its third batch, or does not come back from there, as from a collective call on a GPU.

    Args:
        fails: The process that raises.
        hangs: The process that hangs.
    """

    def __init__(self, fails: int | None = None, hangs: int | None = None) -> None:
        self.fails = fails
        self.hangs = hangs

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.global_rank == self.fails:
            raise ValueError("a fault of the test's")
        if batch_idx == 2 and trainer.global_rank == self.hangs:
            time.sleep(600)
