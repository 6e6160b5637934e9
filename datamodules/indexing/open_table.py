"""The table of the samples that a user names."""

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
from lit_lora.datamodules.remote.transfer import RemoteError, fetch, is_remote, redact
from lit_lora.errors import UserError


def open_table(specs: str | Iterable[str], refresh: bool = False) -> SampleTable:
    """The samples of shards that are named by paths, folders, globs, braces, or URLs of these.

    Local shards are indexed where they have no index yet. Remote ones need the index of their folder beside them
    (``shards.index``), which is copied here.

    Args:
        specs: The shards, in this order.
        refresh: Copy the indexes of remote folders anew, also where there is a copy.

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
    """The folder and the file name of a shard; a URL's folder keeps its query, in which there may be a signature."""
    if not is_remote(location):
        return str(Path(location).parent), Path(location).name
    path, mark, query = location.partition("?")
    folder, _, name = path.rpartition("/")
    return folder + mark + query, name


def split_url(spec: str) -> list[tuple[str, str]]:
    """Remote folders, and the name or glob of shards in each; an empty one for all.

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
    """Where a small file of a remote folder is kept on this machine."""
    return index_cache() / f"{hashlib.sha256(redact(folder).encode()).hexdigest()[:16]}-{name}"


def remote_index_copy(folder: str) -> Path:
    """Where the index of a remote folder is kept on this machine."""
    return remote_copy(folder, INDEX_NAME)


def _remote_index(folder: str, refresh: bool) -> DataIndex:
    copy = remote_index_copy(folder)
    if refresh or not copy.exists():
        try:
            fetch(inside(folder, INDEX_NAME), copy)
        except RemoteError as error:
            if not error.missing:
                raise
            if not copy.exists():  # where there is one, `lit-lora shards index` of the URL has left it
                raise UserError(
                    f"the shards at {redact(folder)} need their index beside them: {error}. Make it where the shards"
                    f" are local (`lit-lora shards index`) and copy {INDEX_NAME} there, or index them from here"
                    " (`lit-lora shards index URL`, which reads all of them once), or read them without an index by"
                    " WebDatasetStreamDataModule"
                ) from None
    return DataIndex.load(copy)
