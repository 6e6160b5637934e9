"""Locks by which runs that write to one folder know of each other."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_lora.errors import UserError
from lit_lora.files import writable_folder
from lit_lora.machine import host
from lit_lora.visible import visible

_NAME = ".run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


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
                owner = _owner_of(file)
                os.close(file)
                return owner or "a process that has just started"
            except OSError:
                os.close(file)
                raise
            self._file = file
            _write_owner(file)
        return None

    def release(self) -> None:
        """Release the lock if this process holds it."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(file)


@contextmanager
def only_run_in(folder: Path, command: str) -> Iterator[None]:
    """Keep other runs of a command from writing into a folder; a folder that stays empty, as after a mistake, is removed.

    The kernel frees the lock when the process ends, however it ends. On a file system without locks there is none.

    Args:
        folder: Output folder, which is created.
        command: Name of the command, which the lock file gets too.

    Raises:
        UserError: If another run of the command writes into the folder, or it cannot be written to.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    path = folder / f"{command}.lock"
    lock = _open_locked(path, command)
    try:
        _write_owner(lock)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, so that nobody else's file is removed
        os.close(lock)
        with suppress(OSError):  # it is not empty
            for one in made:
                one.rmdir()


def _open_locked(path: Path, command: str) -> int:
    while True:
        writable_folder(path.parent)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # another run removed its empty folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner_of(lock) or "it has just started"
            os.close(lock)
            raise UserError(
                f"another run of {command} writes into {visible(path.parent)} ({owner}); wait until it has ended, or name"
                " another output folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                raise
            return lock
        if _is_at(lock, path):
            return lock
        os.close(lock)  # its owner removed it between our opening and locking


def _is_at(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _write_owner(lock: int) -> None:
    """Write into an open lock file that this process holds it."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"host": host(), "pid": os.getpid()}).encode(), 0)


def _owner_of(lock: int) -> str | None:
    """Who holds the lock of an open lock file, for a message; None if nobody has written it down yet."""
    try:
        owner = json.loads(os.pread(lock, 4096, 0))
        return f"process {int(owner['pid'])} on {visible(owner['host'])}"
    except (ValueError, KeyError, TypeError):
        return None
