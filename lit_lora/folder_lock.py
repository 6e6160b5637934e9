"""Whether another run writes to the same folder."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from lit_lora.machine import host

_NAME = ".run.lock"


class FolderLock:
    """Tells runs of each other that write to one folder.

    The kernel frees the lock when the process ends, however it ends, and the process' own children do not hold it. On a file
    system without locks every run is alone.

    Args:
        folder: Folder, which must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._file: int | None = None

    def take(self) -> str | None:
        """Take the lock.

        Returns:
            None, or who holds it.
        """
        with suppress(OSError):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                owner = os.pread(file, 4096, 0)
                os.close(file)
                return _name(owner)
            except OSError:
                os.close(file)
                raise
            self._file = file
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps({"host": host(), "pid": os.getpid()}).encode(), 0)
        return None

    def release(self) -> None:
        """Release the lock if this process holds it."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(file)


def _name(owner: bytes) -> str:
    try:
        entries = json.loads(owner)
        return f"process {int(entries['pid'])} on {entries['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"
