"""Names for what a run does at the moment, for whoever measures it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol


class PhaseListener(Protocol):
    """Is told of phases by :func:`phase`; phases may lie inside each other."""

    def enter_phase(self, name: str) -> None:
        """A phase begins."""

    def leave_phase(self, name: str, failed: bool) -> None:
        """The innermost phase, which is ``name``, ends; ``failed`` where an exception ends it."""


_listeners: list[PhaseListener] = []
_SILENT = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """What is inside the block is the phase ``name`` of the run, for example of :class:`MemoryProfiler`'s table.

    Nothing happens while nobody listens. To be used in the thread that trains.
    """
    return _Phase(name) if _listeners else _SILENT


def add_listener(listener: PhaseListener) -> None:
    """Tell the listener of every phase from now on; once, however often it is added."""
    if listener not in _listeners:
        _listeners.append(listener)


def remove_listener(listener: PhaseListener) -> None:
    """Tell the listener no more; one that is not there is no error."""
    if listener in _listeners:
        _listeners.remove(listener)


class _Phase(AbstractContextManager[None]):
    def __init__(self, name: str) -> None:
        self.name = name
        # Those who come or go inside the block hear neither of its beginning nor of its end.
        self.listeners = list(_listeners)

    def __enter__(self) -> None:
        for listener in self.listeners:
            listener.enter_phase(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for listener in self.listeners:
            if listener in _listeners:
                listener.leave_phase(self.name, failed=error is not None)
