"""The table of the samples in the shards that a user names."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from lit_lora.datamodules.indexing.data_index import INDEX_NAME, DataIndex
from lit_lora.datamodules.indexing.index import index_cache
from lit_lora.datamodules.indexing.shard_paths import expand_braces, find_shards
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.remote.transfer import RemoteError, fetch, is_remote
from lit_lora.errors import UserError
from lit_lora.redact import redact


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
    found: list[str] = []
    indexes: dict[str, DataIndex] = {}
    local: dict[str, list[Path]] = {}
    for spec in specs:
        if is_remote(spec):
            for folder, pattern in split_url(spec):
                if folder not in indexes:
                    indexes[folder] = _remote_index(folder, refresh)
                found += _matching(folder, pattern, indexes[folder])
        else:
            for path in find_shards(spec.removeprefix("file://")):
                found.append(str(path))
                local.setdefault(str(path.parent), []).append(path)
    for folder, paths in local.items():
        indexes[folder] = DataIndex.load_or_build(paths)
    rows = {folder: {name: row for row, name in enumerate(index.names)} for folder, index in indexes.items()}
    shards = []
    for location in found:
        folder, name = folder_and_name(location)
        shards.append((location, indexes[folder], rows[folder][name]))
    return SampleTable(shards)


def folder_and_name(location: str) -> tuple[str, str]:
    """Folder and file name of a shard; the folder of a URL keeps the query, which may contain a signature."""
    if not is_remote(location):
        return str(Path(location).parent), Path(location).name
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
    return [inside(folder, name) for name in names]


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
    if refresh or not copy.exists():
        try:
            fetch(inside(folder, INDEX_NAME), copy)
        except RemoteError as error:
            if not error.missing:
                raise
            if not copy.exists():  # a copy may have been made by `lit-lora shards index URL`
                raise UserError(
                    f"the shards at {redact(folder)} need their index beside them: {error}. Run `lit-lora shards index`"
                    f" where the shards are local and copy {INDEX_NAME} there, or run `lit-lora shards index URL` here, which"
                    " reads all shards once, or use WebDatasetStreamDataModule, which needs no index"
                ) from None
    return DataIndex.load(copy)
