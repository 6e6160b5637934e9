"""Files and folders that are either absent or whole: temporary name, sync, rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_lora.errors import UserError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends without an error, it becomes ``path``.

    A reader sees the old file or the whole new one, also after a crash.

    Raises:
        UserError: If the folder of ``path`` cannot be created or written.
    """
    path = Path(path)
    # Machines that share the folder may have processes of the same number.
    part = path.with_name(path.name + f".{os.getpid()}-{secrets.token_hex(4)}.part")
    writable_folder(path.parent)
    try:
        yield part
        _open_to_others(part)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yield a new, empty folder beside ``path``; when the block ends without an error, it becomes ``path``.

    A folder that stands at ``path`` already is replaced if it is ours; between its removal and the rename ``path`` is
    absent for a moment, never half-written.

    Args:
        path: The folder to make.
        marker: Name of a file by which a folder that may be replaced is known; an empty one may be too.

    Raises:
        UserError: If ``path`` holds something else, or the folder above it cannot be created or written.
    """
    path = Path(path)
    if path.exists() and not (path / marker).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and holds other files ({marker} is not among them); name another folder")
    part = path.with_name(path.name + f".{os.getpid()}.part")
    writable_folder(path.parent)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for entry in sorted(part.rglob("*"), reverse=True):
            if entry.is_file():
                _open_to_others(entry)
            sync(entry)
        if path.exists():
            old = path.with_name(path.name + f".{os.getpid()}.old")
            path.rename(old)
            part.rename(path)
            shutil.rmtree(old)
        else:
            part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync(path.parent)


def writable_folder(path: str | Path) -> Path:
    """Create the folder where it is missing and make sure that files can be written to it.

    Raises:
        UserError: If it cannot be created, is no folder, or is not writable.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}; name another folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"the folder {path} is not writable; name another folder or change its permissions")
    return path


def _open_to_others(path: Path) -> None:
    """Give a file the permissions that new files have; safetensors makes its own for nobody else to read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
