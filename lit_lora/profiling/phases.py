"""Named phases of a run, announced to listeners that measure them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol


class PhaseListener(Protocol):
    """Receives the phases that :func:`phase` announces; phases may be nested."""

    def enter_phase(self, name: str) -> None:
        """A phase of this name begins."""

    def leave_phase(self, name: str, failed: bool) -> None:
        """The innermost phase, called ``name``, ends; ``failed`` is True if an exception ended it."""


_listeners: list[PhaseListener] = []
_SILENT = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """A context that marks a phase of the run, which gets its own row in the table of :class:`MemoryProfiler`.

    It has no effect while there are no listeners. Use it in the thread that trains.

    Args:
        name: Name of the phase.
    """
    return _Phase(name) if _listeners else _SILENT


def add_listener(listener: PhaseListener) -> None:
    """Announce every phase to this listener from now on; adding it again has no effect."""
    if listener not in _listeners:
        _listeners.append(listener)


def remove_listener(listener: PhaseListener) -> None:
    """Stop announcing phases to this listener; removing an unknown listener has no effect."""
    if listener in _listeners:
        _listeners.remove(listener)


class _Phase(AbstractContextManager[None]):
    def __init__(self, name: str) -> None:
        self.name = name
        # A listener that is added inside the block is not told of its end.
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
