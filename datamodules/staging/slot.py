"""The folder in which one staging process keeps shards."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from lit_lora.datamodules.staging.files import PASSED_NAME, SHARD_NAME, STATE_NAME, slot_path, state_path
from lit_lora.machine import host, is_alive

_ORPHAN_WAIT_S = 10.0


class StagerSlot:
    """A numbered folder that belongs to one process while it runs.

    Only regular files whose names have the form of staged files are counted and removed.

    Attributes:
        number: Number of the slot.
        path: Path of the folder.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.path = slot_path(folder, number)
        self._lock: int | None = None

    @classmethod
    def claim(cls, folder: Path, parent: int) -> StagerSlot:
        """Claim the first free slot.

        If the parent of a slot's owner has ended, the owner is about to end too, so this waits for the slot: a restarted job then
        finds its shards.

        Args:
            folder: Folder of the slots.
            parent: Id of the training process for which the caller stages.

        Raises:
            OSError: If the folder cannot be used.
        """
        for number in count():
            slot = cls(folder, number)
            if slot._take(parent):
                return slot
        raise AssertionError("not reached")

    def files(self) -> dict[str, int]:
        """Names and sizes in bytes of the shards in the slot, including those of other data sets."""
        with os.scandir(self.path) as entries:
            return {
                entry.name: entry.stat(follow_symlinks=False).st_size
                for entry in entries
                if SHARD_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
            }

    def clean(self) -> None:
        """Remove unfinished files, and what tells the state of shards that are gone, also while downloads rename some files."""
        states = {state_path(self.path / name).name for name in self.files()}
        with os.scandir(self.path) as entries:
            for entry in entries:
                name = entry.name.removesuffix(".part")
                unfinished = SHARD_NAME.fullmatch(name) and name != entry.name
                left = STATE_NAME.fullmatch(name) and name not in states
                if (unfinished or left or PASSED_NAME.fullmatch(name)) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        os.unlink(entry.path)

    def clean_after_owner(self) -> None:
        """Remove what the downloads of an owner that has ended left, unless the slot has a new one, which did so."""
        with suppress(OSError):
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.clean()
            finally:
                os.close(lock)

    def remove(self, name: str) -> None:
        """Remove a shard if it exists."""
        assert SHARD_NAME.fullmatch(name)
        for path in (self.path / name, state_path(self.path / name)):
            path.unlink(missing_ok=True)

    def _take(self, parent: int) -> bool:
        if not os.path.lexists(self.path):
            self.path.mkdir(exist_ok=True)
        if self.path.is_symlink() or not self.path.is_dir():
            return False
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(self.path / "lock", flags, 0o666)
        if not self._acquire(lock):
            os.close(lock)
            return False
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps({"host": host(), "pid": os.getpid(), "parent": parent}).encode(), 0)
        self._lock = lock
        return True

    def _acquire(self, lock: int) -> bool:
        deadline = time.monotonic() + _ORPHAN_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not _is_orphaned(lock) or time.monotonic() > deadline:
                    return False
            time.sleep(0.02)


def _is_orphaned(lock: int) -> bool:
    """Whether the lock is held by a stager whose training process has ended."""
    try:
        owner = json.loads(os.pread(lock, 4096, 0))
        return bool(owner["host"] == host() and not is_alive(owner["parent"]))
    except (ValueError, KeyError, TypeError):
        return False  # the owner has not written its id yet
