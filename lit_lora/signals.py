"""SIGTERM, which ends a tool as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

ONE_SIGNAL_SECONDS = 3.0
"""Signals of one kind within this time count once: SLURM signals all processes, and torchrun forwards its own to them."""


class Terminated(KeyboardInterrupt):
    """SIGTERM. It is raised where the signal arrives, so that files that are being written are removed."""


def end_at_once(number: int) -> None:
    """End the process by a signal, as one without a handler ends."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """A context in which SIGTERM raises :class:`Terminated`.

    A further one that comes three seconds or more later ends the process at once. Outside of the main thread, which alone can
    handle signals, and where SIGTERM is ignored nothing changes.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    first: list[float] = []

    def terminate(*_: object) -> None:
        now = time.monotonic()
        if not first:
            first.append(now)
            raise Terminated
        if now - first[0] > ONE_SIGNAL_SECONDS:
            end_at_once(signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
