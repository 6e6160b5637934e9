"""The end of a process that has failed, even while others wait for it."""

from __future__ import annotations

import faulthandler
import sys

from lightning.pytorch import Callback, LightningModule, Trainer

_SECONDS_TO_END = 30


class EndOnError(Callback):
    """Prints the error of one of several processes at once, and ends that process within 30 seconds.

    The other processes may wait for it in a collective call. Cleaning up (moving the model to the CPU, a checkpoint callback's
    ``save_on_exception``, closing NCCL) may then wait for them in turn, so the launcher, which would end all of them, sees no
    failed process. Use it in programs that end after an error.
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
