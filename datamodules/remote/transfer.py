"""Transfer of shards from slow disks, HTTP(S), S3 and other storage that fsspec opens."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from lit_lora.datamodules.remote.remote_source import PIECE_BYTES, RemoteError, RemoteSource, TransientError
from lit_lora.errors import UserError
from lit_lora.files import atomic_file
from lit_lora.redact import redact

__all__ = [
    "RemoteError",
    "RetryPolicy",
    "current_state",
    "exists",
    "fetch",
    "fetch_changed",
    "fetch_state",
    "is_remote",
    "list_tars",
    "object_size",
    "ranged_size",
    "read_range",
]

_T = TypeVar("_T")

Limit = int | Callable[[BinaryIO], int] | None
"""Maximum size of an object in bytes; a function reads the beginning of the object and leaves the file at its end."""

_LOG = logging.getLogger("lit_lora")

_SILENT_FAILURES = 3  # in a row; fewer are usual in networks

_OTHER_SHARD = "this is not the shard that was indexed: restore that one, or index the shards again"


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts, and waits between them.

    Attributes:
        attempts: Attempts in a row before reading fails; an attempt that reads at least one more MiB restarts the count.
            Defaults to 8.
        first_wait: Seconds before the second attempt. Defaults to 0.5.
        factor: Factor by which each wait is longer than the previous one. Defaults to 2.0.
        longest_wait: Maximum number of seconds between two attempts, even if the server asks for more (``Retry-After``).
            Defaults to 30.0.
        timeout: Seconds without a response or without data after which an attempt fails. Defaults to 30.0.
        jitter: Fraction by which waits are randomly lengthened or shortened, so that many readers do not retry at the same
            time. Defaults to 0.25.
    """

    attempts: int = 8
    first_wait: float = 0.5
    factor: float = 2.0
    longest_wait: float = 30.0
    timeout: float = 30.0
    jitter: float = 0.25

    def wait(self, failures: int, asked: float = 0.0) -> float:
        """Seconds to wait after a number of failures in a row, at least ``asked``, which the server asked for."""
        # Not the global generator, which the user may have seeded.
        spread = 1 + random.SystemRandom().uniform(-self.jitter, self.jitter)
        return min(max(self.first_wait * self.factor ** (failures - 1) * spread, asked), self.longest_wait)


_DEFAULT = RetryPolicy()


def is_remote(location: str) -> bool:
    """Whether a location is a URL other than ``file://``."""
    if "://" not in location:  # as almost all of 100,000 local ones, for which a regular expression takes longer
        return False
    return re.match(r"[A-Za-z][\w+.:-]*://", location) is not None and not location.startswith("file://")


def fetch(
    location: str, path: Path, size: int | None = None, policy: RetryPolicy = _DEFAULT, most: Limit = None
) -> int:
    """Copy an object to a local file, which is created atomically once it is complete.

    An interrupted download continues where it stopped, unless the object has changed.

    Args:
        location: Path or URL of the object.
        path: Path of the local file.
        size: Required size of the object in bytes. Defaults to None: any size.
        policy: Number of attempts and waits.
        most: Maximum size of the object in bytes, or a function that returns it for the bytes that have come so far, and may
            return another one when more have come. Defaults to None: any size.

    Returns:
        The size of the file in bytes.

    Raises:
        RemoteError: If the object is missing, forbidden, too large or of another size, or if all attempts fail.
        OSError: If the local file cannot be written.
    """
    return _fetch(_source(location, policy), path, size, policy, most)


def fetch_changed(
    location: str, path: Path, known: str | None, policy: RetryPolicy = _DEFAULT, most: Limit = None
) -> str | None:
    """Copy an object like :func:`fetch`, unless its version is the known one.

    Args:
        location: URL of the object.
        path: Path of the local file.
        known: Version of the file that is there already; None if there is none.
        policy: Number of attempts and waits.
        most: Maximum size, see :func:`fetch`.

    Returns:
        Version of the local file, for example its ETag; None if the storage does not state one.

    Raises:
        RemoteError: As for :func:`fetch`.
        OSError: If the local file cannot be written.
    """
    source = _source(location, policy)
    if known is not None and _retry(source, policy, source.current).version == known:
        return known
    _fetch(source, path, None, policy, most)
    return source.stated.version


def fetch_state(location: str, path: Path, size: int, policy: RetryPolicy = _DEFAULT) -> str | None:
    """Copy an object of known size like :func:`fetch`.

    Returns:
        What the storage states of the object that was copied: see :func:`current_state`.

    Raises:
        RemoteError: As for :func:`fetch`.
        OSError: If the local file cannot be written.
    """
    source = _source(location, policy)
    _fetch(source, path, size, policy, None)
    return source.stated.state


def current_state(location: str, policy: RetryPolicy = _DEFAULT) -> str | None:
    """ETag of an object, or its time of change; None if the storage states neither. It differs once the object was replaced.

    Raises:
        RemoteError: If the object is missing or forbidden, or if all attempts fail.
    """
    source = _source(location, policy)
    return _retry(source, policy, source.current).state


def read_range(location: str, offset: int, size: int, policy: RetryPolicy = _DEFAULT) -> bytes:
    """Read ``size`` bytes of an object from ``offset``; this also works in forked processes.

    Raises:
        RemoteError: If the object is too short, missing or forbidden, or if all attempts fail.
    """
    if size == 0:
        return b""
    source = _source(location, policy)
    data = _retry(source, policy, partial(source.read, offset, size))
    if len(data) < size:
        raise source.error(f"it ends at byte {offset + len(data)}, before byte {offset + size}", _OTHER_SHARD)
    return data


def object_size(location: str, policy: RetryPolicy = _DEFAULT) -> int | None:
    """Size of an object in bytes; None if the server does not state it.

    Raises:
        RemoteError: If the object is missing or forbidden, or if all attempts fail.
    """
    source = _source(location, policy)
    return _retry(source, policy, source.size)


def ranged_size(location: str, policy: RetryPolicy = _DEFAULT) -> int | None:
    """Size of an object in bytes if ranges of it can be read; None if the server sends whole objects alone.

    Raises:
        RemoteError: If the object is missing or forbidden, or if all attempts fail.
    """
    source = _source(location, policy)
    return _retry(source, policy, source.ranged_size)


def exists(location: str, policy: RetryPolicy = _DEFAULT) -> bool:
    """Whether an object exists.

    Raises:
        RemoteError: If access is forbidden, or if all attempts fail.
    """
    try:
        object_size(location, policy)
    except RemoteError as error:
        if error.missing:
            return False
        raise
    return True


def list_tars(location: str, policy: RetryPolicy = _DEFAULT) -> list[str]:
    """The sorted locations of the ``*.tar`` files in a folder or that match a glob.

    Raises:
        UserError: If there are none, or the storage cannot list them.
        RemoteError: If access is forbidden, or if all attempts fail.
    """
    if _is_http(location):
        raise UserError(
            f"{redact(location)} cannot be listed, since HTTP has no folders;"
            " name the shards with braces, for example https://host/shard-{000000..000099}.tar"
        )
    from lit_lora.datamodules.remote.filesystem_source import FilesystemSource

    source = FilesystemSource(location, policy.timeout)
    found = _retry(source, policy, source.list_tars)
    if not found:
        raise UserError(f"{redact(location)} contains no *.tar; check the name of the folder or bucket")
    return found


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _source(location: str, policy: RetryPolicy) -> RemoteSource:
    if _is_http(location):
        from lit_lora.datamodules.remote.http_source import HttpSource

        return HttpSource(location, policy.timeout)
    from lit_lora.datamodules.remote.filesystem_source import FilesystemSource

    return FilesystemSource(location, policy.timeout)


def _retry(
    source: RemoteSource, policy: RetryPolicy, action: Callable[[], _T], progress: Callable[[], int] = lambda: 0
) -> _T:
    """Retry an action until it succeeds; ``progress`` returns the number of bytes read so far."""
    failures = furthest = 0
    while True:
        try:
            return action()
        except TransientError as error:
            failure = error
        went_on = progress() >= furthest + PIECE_BYTES
        furthest = progress() if went_on else furthest
        failures = 1 if went_on else failures + 1
        if failures >= policy.attempts:
            tries = "1 attempt" if failures == 1 else f"{failures} attempts in a row"
            raise source.error(f"{failure.reason} ({tries})", failure.action)
        pause = policy.wait(failures, failure.wait)
        if failures >= _SILENT_FAILURES:
            _LOG.warning(
                "cannot read %s: %s; retrying in %.0f s (attempt %d of %d)",
                redact(source.location),
                failure.reason,
                pause,
                failures + 1,
                policy.attempts,
            )
        time.sleep(pause)


def _fetch(source: RemoteSource, path: Path, size: int | None, policy: RetryPolicy, most: Limit) -> int:
    with atomic_file(path) as part:
        with part.open("w+b") as file:
            _retry(source, policy, partial(_read_on, source, file, size, most), file.tell)
        return part.stat().st_size


def _read_on(source: RemoteSource, file: BinaryIO, size: int | None, most: Limit) -> None:
    """One attempt to fetch the rest of the file."""
    with source.open(file.tell()) as stream:
        _check_total(source, stream.total, size)
        file.seek(stream.start)
        file.truncate()
        for piece in stream.pieces:
            if size is not None and file.tell() + len(piece) > size:
                raise source.error(f"it has more than the {size} bytes in its index", _OTHER_SHARD)
            limit = most(file) if callable(most) else most
            if limit is not None and file.tell() + len(piece) > limit:
                raise source.error(f"it has more than {limit} bytes", "check the name and the server")
            file.write(piece)
    expected = stream.total if size is None else size
    if expected is not None and file.tell() < expected:
        raise TransientError(f"it ended after {file.tell()} of {expected} bytes")


def _check_total(source: RemoteSource, total: int | None, size: int | None) -> None:
    if total is None or size is None or total == size:
        return
    reason = f"it has {total} bytes, but {size} in its index"
    if total > size:
        raise source.error(reason, _OTHER_SHARD)
    raise TransientError(reason, _OTHER_SHARD)  # another program may still be writing it
