"""Ends a process that has failed, even while other processes wait for it."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from lit_lora.console import (
    is_config_mistake,
    mark_told,
    other_process_lost,
    out_of_memory,
    port_taken,
    print_error,
    print_mistake,
)
from lit_lora.errors import UserError
from lit_lora.redact import redact_urls
from lit_lora.told_once import SECONDS_TO_ASK, tell_once

_SECONDS_TO_END = 30


class EndOnError(Callback):
    """Prints the error of one of several processes at once, and ends that process within 30 seconds.

    A user's mistake that all processes of a node find alike is printed by one of them, the first if it has it too.

    The other processes may wait for the failed one in a collective call, and its own cleanup (moving the model to the CPU, a
    checkpoint callback's ``save_on_exception``, closing NCCL) may wait for them. Then no process ends, and the launcher, which
    would end all processes after the first failure, sees none. Use the callback in programs that end after an error.

    Args:
        explain: Function from a library's message about a wrong value to what is printed. Defaults to the message itself.
    """

    def __init__(self, explain: Callable[[str], str] = str) -> None:
        self._explain = explain

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1 or not isinstance(
            exception, Exception
        ):  # Ctrl-C and an orderly stop are not failures
            return
        faulthandler.dump_traceback_later(_SECONDS_TO_END, exit=True)
        process = f"process {trainer.global_rank} of {trainer.world_size}"
        if isinstance(exception, UserError | MisconfigurationException) or is_config_mistake(exception):
            message = str(exception)
            if not isinstance(exception, UserError):
                message = self._explain(message)
            _tell_once(message, f"error in {process}", trainer)
            mark_told(exception)
            return
        lost = other_process_lost(exception)  # then the error is the other's
        if known := lost or out_of_memory(exception) or port_taken(exception):
            print_error(known, f"{process} ends" if lost else f"error in {process}")
            mark_told(exception)
            return
        error = redact_urls(f"{type(exception).__name__}: {exception}")
        print(f"lit-lora: {process} failed: {error}", file=sys.stderr, flush=True)


def _tell_once(message: str, title: str, trainer: Trainer) -> None:
    """Print a message unless another process of this node has printed the same."""
    if not distributed.is_initialized():
        print_mistake(message, title)
        return
    told: list[bool] = []

    def ask() -> None:
        key = f"lit_lora of node {trainer.node_rank}: {message}"
        with suppress(RuntimeError):  # the store is gone
            if tell_once(_get_default_store(), key, lambda: print_error(message, title), trainer.local_rank == 0):
                told.append(True)

    # The store of a machine that is gone may not answer.
    asks = Thread(target=ask, daemon=True)
    asks.start()
    asks.join(2 * SECONDS_TO_ASK)
    if not told:
        print_error(message, title)
