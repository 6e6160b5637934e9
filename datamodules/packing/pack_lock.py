"""The lock by which only one run at a time packs into a folder."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_lora.errors import UserError
from lit_lora.files import writable_folder
from lit_lora.folder_lock import owner_of, write_owner
from lit_lora.visible import visible

_NAME = "pack.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_pack_in(out: Path) -> Iterator[None]:
    """Keep other runs from packing into a folder.

    The kernel frees the lock when the process ends, however it ends. On a file system without locks there is none.

    Args:
        out: Folder of the shards, which is created.

    Raises:
        UserError: If another run packs into the folder, or it cannot be written to.
    """
    path = writable_folder(out) / _NAME
    lock = _open_locked(path)
    try:
        write_owner(lock)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, so that nobody else's file is removed
        os.close(lock)


def _open_locked(path: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = owner_of(lock) or "it has just started"
            os.close(lock)
            raise UserError(
                f"another run packs into {visible(path.parent)} ({owner}); wait until it has ended, or name another output"
                " folder"
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
