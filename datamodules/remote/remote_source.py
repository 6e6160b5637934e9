"""The interface of remote storage, and its errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

from lit_lora.errors import UserError
from lit_lora.redact import redact

PIECE_BYTES = 1 << 20
"""Number of bytes that are read at a time, and that an attempt must read to count as progress."""

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that are retried; all other errors are final."""

TRY_LATER = "check the network and the server, then start again"


_WORDS = {
    "NewConnectionError": "no connection to the server",
    "EndpointConnectionError": "no connection to the server",
    "NameResolutionError": "the server's name is not found",
    "ConnectTimeoutError": "the server does not answer",
    "ReadTimeoutError": "the server does not answer",
    "ProtocolError": "the connection broke",
    "IncompleteRead": "the connection broke",
    "ConnectionClosedError": "the connection broke",
}
"""What names of exceptions of urllib3 and botocore mean."""


def in_words(error: Exception) -> str:
    """What an exception means, by its type, or the name of its type."""
    name = type(error).__name__
    return _WORDS.get(name, name)


class RemoteError(UserError):
    """A remote shard cannot be read. The message contains no credentials.

    Attributes:
        missing: Whether the object does not exist.
    """

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class TransientError(Exception):
    """A temporary failure, after which another attempt may succeed.

    Args:
        reason: Description of the failure, without credentials.
        action: Advice to the user if all attempts fail.
        wait: Seconds that the server asks to wait. Defaults to 0.
    """

    def __init__(self, reason: str, action: str = TRY_LATER, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.action = action
        self.wait = wait


class Stream(NamedTuple):
    """An object that is being read.

    Attributes:
        start: Offset of the first piece in the object, in bytes.
        total: Size of the whole object in bytes, if known.
        pieces: The bytes from ``start`` on, in pieces.
    """

    start: int
    total: int | None
    pieces: Iterator[bytes]


class Stated(NamedTuple):
    """What a storage states of an object beside its size.

    Attributes:
        version: A text that changes with the object's bytes; None if the storage does not state one.
        state: The same, or the time of change where the storage states that alone, which two quick changes may share.
    """

    version: str | None
    state: str | None


class RemoteSource(ABC):
    """An object in some kind of storage.

    All methods, and the pieces of a stream, raise :class:`TransientError` for temporary failures and :class:`RemoteError` for
    final ones.

    Args:
        location: Path or URL of the object.
        timeout: Seconds without a response or without data after which an attempt fails.
    """

    stated: Stated = Stated(None, None)
    """What the storage stated of the object that :meth:`open` read."""

    def __init__(self, location: str, timeout: float) -> None:
        self.location = location
        self.timeout = timeout

    @abstractmethod
    def open(self, start: int) -> AbstractContextManager[Stream]:
        """Read from ``start``, or from 0 if that is not possible or the object has changed."""

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes of the object from ``offset``, fewer if it ends before."""

    @abstractmethod
    def size(self) -> int | None:
        """Size of the object in bytes; None if the storage does not state it."""

    @abstractmethod
    def ranged_size(self) -> int | None:
        """Size of the object in bytes if :meth:`read` transfers no more than it returns; otherwise None."""

    @abstractmethod
    def current(self) -> Stated:
        """What :attr:`stated` would be if the object were read now."""

    def error(self, reason: str, action: str, missing: bool = False) -> RemoteError:
        """A :class:`RemoteError` that names the object."""
        return RemoteError(f"cannot read {redact(self.location)}: {reason}; {action}", missing)
