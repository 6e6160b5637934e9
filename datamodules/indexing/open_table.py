"""The table of the samples in the shards that a user names."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
from lit_lora.datamodules.indexing.index import index_cache
from lit_lora.datamodules.indexing.safetensors_map import MAX_HEADER_BYTES, header_length, parse_header
from lit_lora.datamodules.indexing.shard_paths import expand_braces, find_shards
from lit_lora.datamodules.indexing.sparse_copy import check_stated_size, copy_table
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.remote.transfer import Limit, RemoteError, fetch_changed, is_remote, ranged_size
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, check_regular, remedy, remove_unfinished
from lit_lora.redact import redact

_SMALL_BYTES = 16 << 20
"""Size below which an index is copied whole at each start, without asking whether it has changed."""


def open_table(specs: str | Iterable[str], refresh: bool = False) -> SampleTable:
    """Open the table of the samples in shards.

    Local shards are indexed if they have no index yet. Remote shards need the index of their folder beside them
    (``shards.index``), which is copied to this machine.

    Args:
        specs: Paths of shards, folders, globs, braces, or URLs of these; the table keeps their order.
        refresh: Whether to copy the indexes of remote folders even if there is a copy. Defaults to False.

    Raises:
        UserError: If shards or indexes are missing or damaged.
    """
    specs = [os.fspath(spec) for spec in ([specs] if isinstance(specs, str | Path) else specs)]
    found: list[tuple[str, str, str]] = []  # location, folder and name
    indexes: dict[str, DataIndex] = {}
    local: dict[str, list[Path]] = {}
    for spec in specs:
        if is_remote(spec):
            for folder, pattern in split_url(spec):
                if folder not in indexes:
                    indexes[folder] = _remote_index(folder, refresh)
                names = _matching(folder, pattern, indexes[folder])
                found += [(inside(folder, name), folder, name) for name in names]
        else:
            for path in find_shards(spec.removeprefix("file://")):
                path_folder, name = folder_and_name(str(path))
                found.append((str(path), path_folder, name))
                local.setdefault(path_folder, []).append(path)
    for folder, paths in local.items():
        indexes[folder] = DataIndex.load_or_build(paths)
    rows = {folder: {name: row for row, name in enumerate(index.names)} for folder, index in indexes.items()}
    return SampleTable([(location, indexes[folder], rows[folder][name]) for location, folder, name in found])


def folder_and_name(location: str) -> tuple[str, str]:
    """Folder and file name of a shard with a normalized path; the folder of a URL keeps its query, maybe a signature."""
    if not is_remote(location):
        folder, slash, name = location.rpartition("/")  # pathlib takes a second for 100,000 paths
        return folder or slash or ".", name
    path, mark, query = location.partition("?")
    folder, _, name = path.rpartition("/")
    return folder + mark + query, name


def split_url(spec: str) -> list[tuple[str, str]]:
    """Remote folders, each with the name or glob of its shards, or an empty string for all shards.

    Raises:
        UserError: If braces are unbalanced.
    """
    pairs = []
    for url in expand_braces(spec):
        folder, name = folder_and_name(url)
        if name.endswith(".tar") or glob.has_magic(name):
            pairs.append((folder, name))
        else:
            path, mark, query = url.partition("?")
            pairs.append((path.rstrip("/") + mark + query, ""))
    return pairs


def _matching(folder: str, pattern: str, index: DataIndex) -> list[str]:
    if not pattern:
        names = sorted(index.names)
    elif glob.has_magic(pattern):
        names = sorted(fnmatch.filter(index.names, pattern))
    else:
        names = [pattern] if pattern in set(index.names) else []
    if not names:
        raise UserError(
            f"the index of {redact(folder)} has no shard {pattern};"
            " check the name, or index the folder again (`lit-lora shards index`)"
        )
    return names


def inside(folder: str, name: str) -> str:
    """The path or URL of a file in a folder, the inverse of :func:`folder_and_name`."""
    path, mark, query = folder.partition("?")
    return f"{path}/{name}{mark}{query}"


def remote_copy(folder: str, name: str) -> Path:
    """Path of the local copy of a small file in a remote folder."""
    return index_cache() / f"{hashlib.sha256(redact(folder).encode()).hexdigest()[:16]}-{name}"


def remote_index_copy(folder: str) -> Path:
    """Path of the local copy of a remote folder's index."""
    return remote_copy(folder, INDEX_NAME)


def _remote_index(folder: str, refresh: bool) -> DataIndex:
    copy = remote_index_copy(folder)
    known = _known_version(copy)
    if not copy.exists() or (refresh and not known):
        _fetch_index(folder, copy)
        return _load(folder, copy)
    if refresh:
        _fetch_index(folder, copy, known)
    try:
        return _load(folder, copy)
    except UserError as error:
        warnings.warn(f"{error}; it is copied again", stacklevel=2)
        _fetch_index(folder, copy)
        return _load(folder, copy)


def _load(folder: str, copy: Path) -> DataIndex:
    """Map a copy; parts of a large one may not be there yet."""
    is_large = copy.exists() and copy.stat().st_size >= _SMALL_BYTES
    return DataIndex.load(copy, inside(folder, INDEX_NAME) if is_large else None)


def _fetch_index(folder: str, copy: Path, known: str | None = None) -> None:
    """Copy an index: of a large one only the table of its shards, if the server lets parts of it be read.

    Otherwise it is copied whole, unless the copy already is the ``known`` version and the storage still has that.
    """
    location = inside(folder, INDEX_NAME)
    try:
        size = ranged_size(location)
        if size is not None and size >= _SMALL_BYTES:
            with _writing_copy(location, copy):
                copy_table(location, size, copy)
            return
        version = fetch_small(location, copy, _IndexLimit(), known)
    except RemoteError as error:
        if not error.missing:
            raise
        if not copy.exists():  # a copy may have been made by `lit-lora shards index URL`
            raise UserError(
                f"the shards at {redact(folder)} need their index beside them: {error}. Run `lit-lora shards index`"
                f" where the shards are local and copy {INDEX_NAME} there, or run `lit-lora shards index URL` here, which"
                " reads all shards once, or use WebDatasetStreamDataModule, which needs no index"
            ) from None
        return
    if version is not None and version != known and copy.stat().st_size >= _SMALL_BYTES:
        with suppress(UserError, OSError), atomic_file(_version_file(copy)) as part:
            part.write_text(json.dumps({"copy": _stamp(copy), "version": version}), "utf-8")


def _known_version(copy: Path) -> str | None:
    """The version of the remote index that a copy was made from; None if it is unknown, or the copy was changed since."""
    try:
        check_regular(_version_file(copy))
        kept = json.loads(_version_file(copy).read_text("utf-8"))
        return str(kept["version"]) if kept["copy"] == _stamp(copy) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _version_file(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.version")


def _stamp(copy: Path) -> list[int]:
    stat = copy.stat()
    return [stat.st_size, stat.st_mtime_ns]


def fetch_small(location: str, copy: Path, most: Limit, known: str | None = None) -> str | None:
    """Copy a file that accompanies shards.

    Args:
        location: URL of the file.
        copy: Path of the local copy.
        most: Maximum size, see :func:`~lit_lora.datamodules.remote.transfer.fetch`.
        known: Version of which there is a copy; that one is not copied again. Defaults to None: there is none.

    Returns:
        Version of the copy; None if the storage does not state versions.

    Raises:
        RemoteError: If the file is missing, forbidden or too large, or if all attempts fail.
        UserError: If the copy cannot be written, or ``most`` refuses what it reads.
    """
    with _writing_copy(location, copy):
        return fetch_changed(location, copy, known, most=most)


@contextmanager
def _writing_copy(location: str, copy: Path) -> Iterator[None]:
    """Remove what killed processes left, and name the file in errors."""
    remove_unfinished(copy.parent, glob.escape(copy.name))
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{redact(location)} is not a readable index ({error}); copy the right file there") from error
    except OSError as error:
        raise UserError(
            f"cannot write the copy of {redact(location)} to {copy}: {error.strerror}; {remedy(error)}"
        ) from error


class _IndexLimit:
    """Size of an index according to its header, by as much of it as has come."""

    def __init__(self) -> None:
        self._seen = 0
        self._size: int | None = None

    def __call__(self, file: BinaryIO) -> int:
        end = file.tell()
        if end < self._seen:  # the object has changed and is read anew
            self._size = None
        self._seen = end
        if self._size is None and end >= 8:
            file.seek(0)
            length = header_length(file.read(8))
            if end >= 8 + length:
                tensors = parse_header(file.read(length))
                self._size = 8 + length + max(high for _, _, high in tensors.values())
            file.seek(end)
        if self._size is not None:
            check_stated_size(self._size)
        return MAX_HEADER_BYTES if self._size is None else self._size
