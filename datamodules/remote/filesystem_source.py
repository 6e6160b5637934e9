"""Objects on file systems that fsspec opens: local and mounted disks, S3, Google Cloud Storage, SFTP and others."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from glob import has_magic
from typing import Any

from lit_lora.datamodules.remote.pace import Pace
from lit_lora.datamodules.remote.remote_source import (
    PIECE_BYTES,
    RETRIED_STATUS,
    RemoteError,
    RemoteSource,
    Stated,
    Stream,
    TransientError,
    in_words,
)
from lit_lora.errors import UserError

_BLOCK_BYTES = 16 << 20
_S3_SCHEMES = ("s3", "s3a")
_CHECK_ACCESS = "check the credentials and the permissions"
_FINAL_ERRNOS = {
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMSGSIZE,
    errno.ENAMETOOLONG,
    errno.ENOSYS,
    errno.ENOTDIR,
    errno.ENOTSUP,
}
_FINAL_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)

# A file system that is garbage-collected in a forked process tries to end its connections through the parent's event loop and
# waits for it forever. So all file systems are kept.
_kept: dict[int, Any] = {}


class FilesystemSource(RemoteSource):
    """An object that fsspec opens."""

    _info: str | None = None

    @contextmanager
    def open(self, start: int) -> Iterator[Stream]:
        with self._translated():
            filesystem, path = self._filesystem
            info = filesystem.info(path)
            start = start if str(info) == self._info else 0
            file = filesystem.open(path, "rb", block_size=_BLOCK_BYTES)
        self._info, self.stated = str(info), _stated(info)
        with file:
            yield Stream(start, info.get("size"), self._pieces(file, start))

    def read(self, offset: int, size: int) -> bytes:
        with self._translated():
            filesystem, path = self._filesystem
            data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
        return data

    def size(self) -> int | None:
        with self._translated():
            filesystem, path = self._filesystem
            size: int | None = filesystem.info(path).get("size")
        return size

    def ranged_size(self) -> int | None:
        return self.size()

    def current(self) -> Stated:
        with self._translated():
            filesystem, path = self._filesystem
            return _stated(filesystem.info(path))

    def list_tars(self) -> list[str]:
        """The sorted locations of the ``*.tar`` files in this folder or that match this glob."""
        with self._translated():
            filesystem, path = self._filesystem
            filesystem.invalidate_cache()
            found = filesystem.glob(path if has_magic(path) else path.rstrip("/") + "/*.tar")
        # fsspec omits the host from some paths, so it is taken from the location.
        location = self.location.rstrip("/")
        prefix = location.removesuffix(path) if location.endswith(path) else None
        names = [filesystem.unstrip_protocol(name) if prefix is None else prefix + name for name in found]
        return sorted(name for name in names if name.endswith(".tar"))

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        _prepare_for_forks()
        scheme, mark, path = self.location.partition("://")
        if not mark or scheme == "file":
            return LocalFileSystem(), path if mark else self.location
        try:
            filesystem, path = fsspec.url_to_fs(self.location, **self._options(scheme))
        except ImportError as error:
            extra = 'pip install "lit_lora[s3]"' if scheme in _S3_SCHEMES else str(error)
            raise UserError(f"{scheme}:// needs a package that is not installed: {extra}") from None
        except ValueError:
            raise self.error(f"{scheme}:// is not known to fsspec", "check the location") from None
        if scheme in _S3_SCHEMES:
            filesystem.retries = 1  # retries are made by transfer._retry alone
        _kept[id(filesystem)] = filesystem
        return filesystem, path

    def _options(self, scheme: str) -> dict[str, Any]:
        if scheme not in _S3_SCHEMES:
            return {}
        from fsspec.config import conf

        limits = {"connect_timeout": self.timeout, "read_timeout": self.timeout, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": limits | conf.get(scheme, {}).get("config_kwargs", {})}

    def _pieces(self, file: Any, start: int) -> Iterator[bytes]:
        with self._translated():
            file.seek(start)
        pace = Pace(self.timeout)
        while True:
            before = time.monotonic()
            with self._translated():
                piece = file.read(PIECE_BYTES)
            waited = time.monotonic() - before
            if not piece:
                return
            yield piece
            pace.add(len(piece), waited)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (UserError, TransientError):
            raise
        except Exception as error:  # each kind of storage raises its own exceptions
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> RemoteError | TransientError:
        """Convert an exception to an error of this package, without its message, which may contain a URL."""
        if isinstance(error, FileNotFoundError):
            return self.error("it does not exist", "check the name", missing=True)
        description = _describe(error)
        if isinstance(error, PermissionError) or "Credential" in description:
            return self.error(f"access is denied, {description}", _CHECK_ACCESS)
        return TransientError(description) if _may_pass(error) else self.error(description, "check the location")


def _version(info: Mapping[str, Any]) -> str | None:
    """The ETag of an object, which S3 and Google Cloud Storage state."""
    etag = info.get("ETag") or info.get("etag")
    return str(etag) if etag else None


def _stated(info: Mapping[str, Any]) -> Stated:
    version = _version(info)
    times = [info.get(name) for name in ("mtime", "LastModified", "updated", "last_modified")]
    return Stated(version, version or next((str(value) for value in times if value is not None), None))


@cache
def _prepare_for_forks() -> None:
    """Reset fsspec's lock in forked processes, since a lock that another thread holds would never be released there."""
    import fsspec.asyn

    os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


def _may_pass(error: Exception) -> bool:
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status in RETRIED_STATUS
    botocore = sys.modules.get("botocore.exceptions")  # if it was not imported, it did not raise the error
    if botocore is not None and isinstance(error, botocore.BotoCoreError):
        passing = (botocore.HTTPClientError, botocore.ConnectionError, botocore.IncompleteReadError)
        return isinstance(error, passing)
    if isinstance(error, OSError):
        return error.errno not in _FINAL_ERRNOS
    return not isinstance(error, _FINAL_ERRORS)


def _describe(error: Exception) -> str:
    """What an error means, or its type with its S3 or system error code."""
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(answer, dict) and "Error" in answer:
        return f"{type(error).__name__} ({answer['Error'].get('Code')})"
    if isinstance(error, OSError) and error.errno:
        return f"{type(error).__name__} ({os.strerror(error.errno)})"
    return in_words(error)
