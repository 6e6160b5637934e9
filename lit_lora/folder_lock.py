"""Whether another run writes to the same folder."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from lit_lora.machine import host
from lit_lora.visible import visible

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
                owner = owner_of(file)
                os.close(file)
                return owner or "a process that has just started"
            except OSError:
                os.close(file)
                raise
            self._file = file
            write_owner(file)
        return None

    def release(self) -> None:
        """Release the lock if this process holds it."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(file)


def write_owner(lock: int) -> None:
    """Write into an open lock file that this process holds it."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"host": host(), "pid": os.getpid()}).encode(), 0)


def owner_of(lock: int) -> str | None:
    """Who holds the lock of an open lock file, for a message; None if nobody has written it down yet."""
    try:
        owner = json.loads(os.pread(lock, 4096, 0))
        return f"process {int(owner['pid'])} on {visible(owner['host'])}"
    except (ValueError, KeyError, TypeError):
        return None
