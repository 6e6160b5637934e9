"""Atomic writes of files and folders: temporary name, sync, rename."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from lit_lora.errors import UserError
from lit_lora.machine import is_alive, process_space

_PART = re.compile(r"(?P<name>.+)\.(?P<space>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.part")

_ABANDONED_S = 86_400.0

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_REMEDIES = {
    "free some space": _FULL,
    "raise the limit of a file's size (ulimit -f)": (errno.EFBIG,),
    "raise the limit of open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "change the permissions there": (errno.EACCES, errno.EPERM, errno.EBADF),
    "the disk is mounted for reading only: mount it for writing": (errno.EROFS,),
    "another disk is mounted there: unmount it": (errno.EBUSY,),
    "the network disk has lost the file: mount it again": (errno.ESTALE,),
    "leave the folder alone while a run uses it": (errno.ENOENT,),
    "a file has the name of a folder there: remove it": (errno.ENOTDIR, errno.EEXIST),
    "a folder has the name of the file: remove it": (errno.EISDIR,),
}


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends without an error, it becomes ``path``.

    A reader sees the old file or the complete new one, also after a crash.

    Args:
        path: File to write.

    Raises:
        UserError: If the folder of ``path`` cannot be created or written.
    """
    path = Path(path)
    part = part_path(path)
    writable_folder(path.parent)
    try:
        yield part
        _open_to_others(part)
        sync(part)
        part.replace(path)
    except OSError as error:
        _name_file(error, part, path)
        raise
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yield a new, empty folder beside ``path``; when the block ends without an error, it becomes ``path``.

    An existing folder is replaced if it is empty or holds the marker file; ``path`` is then absent for a moment, but never
    incomplete.

    Args:
        path: Folder to write.
        marker: Name of a file that every folder written here holds.

    Raises:
        UserError: If ``path`` holds other files, or its parent folder cannot be created or written.
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
    except OSError as error:
        _name_file(error, part, path)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync(path.parent)


def restore_replaced(folder: Path, pattern: str) -> None:
    """Finish what killed processes did in :func:`atomic_folder`: remove old folders, or put them back where no new one is.

    Args:
        folder: Folder to look through.
        pattern: Glob pattern of the names of the folders that were being replaced.
    """
    for old in folder.glob(f"{pattern}.*.old"):
        path = old.with_name(old.name.rsplit(".", 2)[0])
        if os.path.lexists(path):
            shutil.rmtree(old)
        else:
            old.rename(path)


def part_path(path: Path) -> Path:
    """A new temporary name beside ``path``, which tells the process that writes it."""
    # Machines that share the folder may have processes with the same id.
    return path.with_name(f"{path.name}.{process_space()}-{os.getpid()}-{secrets.token_hex(4)}.part")


def remove_unfinished(folder: Path, *patterns: str) -> None:
    """Remove temporary files that killed processes have left in a folder; those of running ones are kept.

    Of processes of other machines nothing is known, so their files count as left over a day after the last write.

    Args:
        folder: Folder to look through, which may be missing or not writable.
        patterns: Glob patterns of the names of the files that were being written.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _PART.fullmatch(entry.name)
            if found is None or not any(fnmatchcase(found["name"], pattern) for pattern in patterns):
                continue
            with suppress(OSError):
                is_here = found["space"] == process_space()
                old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_S
                if old if not is_here else not is_alive(int(found["pid"])):
                    os.unlink(entry.path)


def remove_parts(paths: Iterable[Path]) -> None:
    """Remove the temporary files of these files, from killed processes of any machine; nobody may be writing them.

    Args:
        paths: Files that :func:`atomic_file` writes.
    """
    for path in paths:
        for left_over in path.parent.glob(f"{path.name}.*.part"):
            left_over.unlink(missing_ok=True)


def writable_folder(path: str | Path) -> Path:
    """Create the folder if it is missing and check that files can be written to it.

    Args:
        path: Folder to create or check.

    Raises:
        UserError: If the folder cannot be created, is not a folder, or is not writable.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        found = (
            f"a symbolic link to {os.readlink(path)}, where no folder is"
            if path.is_symlink()
            else "a file, not a folder"
        )
        raise UserError(f"{path} is {found}; name another folder") from error
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}; name another folder") from error
    if not os.access(path, os.W_OK | os.X_OK) or not _takes_files(path):
        raise UserError(f"the folder {path} is not writable; name another folder or change its permissions")
    return path


def check_place(path: str | Path) -> None:
    """Check, before any work, that a file or folder can be made; no folder is created.

    Args:
        path: File or folder that will be written.

    Raises:
        UserError: If the nearest folder that exists is not a folder, or is not writable.
    """
    path = Path(path).absolute()
    # The root has no folder above it.
    writable_folder(next((folder for folder in path.parents if folder.exists()), path))


def _takes_files(folder: Path) -> bool:
    """Whether a file can be made; permissions alone do not tell, as of /proc, where root may write but nobody can."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            return False
        if error.errno not in _FULL:  # a full disk is told by the write itself, which names its file
            raise
    return True


def remedy(error: OSError) -> str:
    """The next action after an error that ended a write, such as "free some space"."""
    return next((todo for todo, numbers in _REMEDIES.items() if error.errno in numbers), "check the disk")


def check_regular(path: str | Path) -> os.stat_result:
    """Refuse anything but a regular file, since opening or reading a pipe, a device or a socket may never end.

    Returns:
        The state of the file.

    Raises:
        OSError: If the file is missing.
        UserError: If it is not a regular file.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise UserError(f"{path} is {kind}, not a regular file; name a file, or remove it")
    return found


def check_readable(path: str | Path) -> None:
    """Refuse a file that may not be read, which safetensors calls missing, and anything but a regular file.

    Raises:
        OSError: If the file is missing or may not be read.
        UserError: If it is not a regular file.
    """
    check_regular(path)
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _name_file(error: OSError, part: Path, path: Path) -> None:
    """Have an error name the file that was to be written: writing itself raises errors without a name."""
    if error.errno is not None and (error.filename is None or str(error.filename).startswith(str(part))):
        error.filename = str(path)


def _open_to_others(path: Path) -> None:
    """Set a file's permissions to the default for new files; safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(target: Path, link: Path) -> None:
    """Point ``link`` at ``target`` atomically."""
    part = link.with_name(link.name + ".part")
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(target, link.parent))
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    part.replace(link)
