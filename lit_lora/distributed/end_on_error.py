"""Ends a process that has failed, even while other processes wait for it."""

from __future__ import annotations

import faulthandler
import sys

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_lora.redact import redact_urls

_SECONDS_TO_END = 30


class EndOnError(Callback):
    """Prints the error of one of several processes at once, and ends that process within 30 seconds.

    The other processes may wait for the failed one in a collective call, and its own cleanup (moving the model to the CPU, a
    checkpoint callback's ``save_on_exception``, closing NCCL) may wait for them. Then no process ends, and the launcher, which
    would end all processes after the first failure, sees none. Use the callback in programs that end after an error.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1 or not isinstance(
            exception, Exception
        ):  # Ctrl-C and an orderly stop are not failures
            return
        error = redact_urls(f"{type(exception).__name__}: {exception}")
        print(
            f"lit-lora: process {trainer.global_rank} of {trainer.world_size} failed: {error}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback_later(_SECONDS_TO_END, exit=True)
