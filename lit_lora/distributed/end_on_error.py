"""Ends a process that has failed, even while other processes wait for it."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Thread

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from lit_lora.console import is_config_mistake, mark_told, print_error
from lit_lora.errors import UserError
from lit_lora.redact import redact_urls

_SECONDS_TO_END = 30
_SECONDS_TO_ASK, _SECONDS_OF_FIRST = 5, 1
"""How long a process waits for another that may have told the same mistake; how long the others of a node wait for the first,
whose output may be the only one that is shown."""


class EndOnError(Callback):
    """Prints the error of one of several processes at once, and ends that process within 30 seconds.

    A user's mistake that all processes of a node find alike is printed by one of them, the first if it has it too.

    The other processes may wait for the failed one in a collective call, and its own cleanup (moving the model to the CPU, a
    checkpoint callback's ``save_on_exception``, closing NCCL) may wait for them. Then no process ends, and the launcher, which
    would end all processes after the first failure, sees none. Use the callback in programs that end after an error.

    Args:
        explain: Function from Lightning's message about a wrong value to what is printed. Defaults to the message itself.
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
            if isinstance(exception, MisconfigurationException):
                message = self._explain(message)
            _tell_once(message, f"error in {process}", trainer)
            mark_told(exception)
            return
        error = redact_urls(f"{type(exception).__name__}: {exception}")
        print(f"lit-lora: {process} failed: {error}", file=sys.stderr, flush=True)


def _tell_once(message: str, title: str, trainer: Trainer) -> None:
    """Print a message unless another process of this node has printed the same."""
    told: list[str] = []
    if distributed.is_initialized():
        # The store of a machine that is gone may not answer.
        key = f"lit_lora of node {trainer.node_rank}: {message}"
        asks = Thread(target=_ask, args=(key, message, title, told, trainer.local_rank == 0), daemon=True)
        asks.start()
        asks.join(2 * _SECONDS_TO_ASK)
    if not told:
        print_error(message, title)


def _ask(key: str, message: str, title: str, told: list[str], is_first: bool) -> None:
    """Print a message for all processes, or wait until another has done so, and note that it is told."""
    with suppress(RuntimeError):  # the store is gone, or the other process ended before it printed
        store = _get_default_store()
        if not is_first:
            with suppress(distributed.DistStoreError):  # the first has not found this
                store.wait([f"{key} begun"], timedelta(seconds=_SECONDS_OF_FIRST))
        if store.add(f"{key} begun", 1) == 1:
            print_error(message, title)
            told.append(title)
            store.set(f"{key} done", title)
        else:
            store.wait([f"{key} done"], timedelta(seconds=_SECONDS_TO_ASK))
            told.append(title)
