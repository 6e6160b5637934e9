"""The interface of a kind of storage, and its errors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

from lit_lora.errors import UserError

PIECE_BYTES = 1 << 20
"""How much is read at a time, and how much must have come in for a download to count as going on."""

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers of a server that may be others a moment later; all further errors are final."""

_CONTAINER_SCHEMES = ("abfs", "abfss")  # what stands before the @ is a container there

TRY_LATER = "check the network and the server, then start again"


class RemoteError(UserError):
    """A remote shard cannot be read. The message holds no credentials.

    Attributes:
        missing: Whether there is nothing at that place.
    """

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class TransientError(Exception):
    """A failure that may pass, so that another attempt makes sense.

    Args:
        reason: What happened, without credentials.
        action: What the user can do if it does not pass.
        wait: How long the server asks to wait in seconds.
    """

    def __init__(self, reason: str, action: str = TRY_LATER, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.action = action
        self.wait = wait


class Stream(NamedTuple):
    """An object that is being read.

    Attributes:
        start: The offset in bytes of the first piece.
        total: Bytes of the whole object, if that is known.
        pieces: The bytes from ``start`` on.
    """

    start: int
    total: int | None
    pieces: Iterator[bytes]


class RemoteSource(ABC):
    """One object on one kind of storage.

    All methods, and the pieces of a stream, raise :class:`TransientError` for what may pass and :class:`RemoteError`
    for what will not.

    Args:
        location: The path or URL of the object.
        timeout: Seconds without an answer or without bytes after which a try has failed.
    """

    def __init__(self, location: str, timeout: float) -> None:
        self.location = location
        self.timeout = timeout

    @abstractmethod
    def open(self, start: int) -> AbstractContextManager[Stream]:
        """Read on from ``start``, or from 0 where that is not possible or the object has changed since."""

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """These bytes of the object, fewer where it ends before."""

    @abstractmethod
    def size(self) -> int | None:
        """Bytes of the object, if the storage tells."""

    def error(self, reason: str, action: str, missing: bool = False) -> RemoteError:
        """A :class:`RemoteError` that names the object."""
        return RemoteError(f"cannot read {redact(self.location)}: {reason}; {action}", missing)


def redact(location: str) -> str:
    """A path or URL without user, password, query and fragment, as it may be shown and logged."""
    # fsspec chains URLs by "::".
    return "::".join(_redact(part) for part in re.split(r"::(?=[A-Za-z][\w+.-]*(?:://|::))", location))


def _redact(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    if not mark or scheme == "file":
        return url
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    user, at, host = authority.rpartition("@")
    if scheme in _CONTAINER_SCHEMES and ":" not in user:
        host = user + at + host
    # What follows a colon is a port. Anything else is a part of a password that was not percent-encoded.
    if not re.fullmatch(r"(\[[\w:.%]*\]|[^:]*)(:\d*)?", host):
        return f"{scheme}://..."
    return f"{scheme}://{host}{slash}{path}"
