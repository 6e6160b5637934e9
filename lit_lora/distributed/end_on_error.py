"""A process that has failed ends, whoever waits for it."""

from __future__ import annotations

import faulthandler
import sys

from lightning.pytorch import Callback, LightningModule, Trainer

_SECONDS_TO_END = 30


class EndOnError(Callback):
    """An error in one of several processes is on the console at once, and that process ends within half a minute.

    The others may wait for it in a collective call. Then what Lightning and libraries do on the way out, moving the model to
    the CPU, a checkpoint callback's ``save_on_exception`` or closing NCCL, may wait for them in turn, and the launcher, which
    would end all of them, sees no process that has failed. For a program that does not go on after an error.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1 or not isinstance(exception, Exception):  # not for Ctrl-C and an orderly stop
            return
        error = f"{type(exception).__name__}: {exception}"
        print(
            f"lit-lora: process {trainer.global_rank} of {trainer.world_size} fails: {error}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback_later(_SECONDS_TO_END, exit=True)
