"""Recursive listing of the files below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path

from lit_lora.errors import UserError


def walk_files(folder: Path, skip: Path | None = None) -> Iterator[tuple[str, Set[str]]]:
    """Yield all files below a folder, sorted by path, each with the names of the files beside it.

    Links are followed, except those to a folder that contains the link.

    Args:
        folder: Folder to list.
        skip: Folder to skip. Defaults to None.

    Yields:
        Path of the file relative to ``folder``, with ``/``; and the names of all files in its folder.

    Raises:
        UserError: If a folder cannot be read.
    """
    return _walk(folder, "", None if skip is None else skip.resolve(), ())


def _walk(
    folder: Path, prefix: str, skip: Path | None, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, Set[str]]]:
    try:
        stat = folder.stat()
        here = (stat.st_dev, stat.st_ino)
        if here in above or folder.resolve() == skip:
            return
        with os.scandir(folder) as entries:
            # With the slash, names are sorted like full paths.
            names = sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in entries)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}; check its permissions") from error
    files = {name for name in names if not name.endswith("/")}
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name, prefix + name, skip, (*above, here))
        else:
            yield prefix + name, files
