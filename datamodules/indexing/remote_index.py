"""Indexing of remote shards without local space for all of them."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lit_lora.datamodules.indexing.data_index import DataIndex, refuse_unusable
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.open_table import folder_and_name, inside, remote_index_copy, split_url
from lit_lora.datamodules.remote.transfer import fetch, list_tars, object_size
from lit_lora.distributed.jobs import check_workers
from lit_lora.errors import UserError
from lit_lora.files import remedy, remove_unfinished, writable_folder
from lit_lora.redact import redact


def index_remote(specs: Iterable[str], jobs: int = 1) -> dict[str, Path]:
    """Read each shard once and save the index of each folder on this machine, where training finds it.

    At most ``jobs`` shards are on the disk at a time. An interrupted run continues when it is started again; shards whose size
    has changed since they were indexed are read again.

    Args:
        specs: URLs of shards, also with braces; globs and folders if the storage can list them.
        jobs: Number of shards that are read at a time. Defaults to 1.

    Returns:
        The index file of each folder, by the folder's URL without credentials.

    Raises:
        UserError: If shards are missing or damaged; the message names all of them. The indexes of the other shards are saved.
    """
    check_workers(jobs=jobs)
    folders: dict[str, list[str]] = {}
    for spec in specs:
        for folder, pattern in split_url(spec):
            named = pattern and not glob.has_magic(pattern)
            locations = [inside(folder, pattern)] if named else list_tars(inside(folder, pattern or "*.tar"))
            folders.setdefault(folder, []).extend(locations)
    found = {}
    for folder, locations in folders.items():
        file = remote_index_copy(folder)
        workspace = writable_folder(file.with_suffix(".parts"))
        remove_unfinished(workspace, "*")
        remove_unfinished(file.parent, glob.escape(file.name))
        indexes = _index_all(list(dict.fromkeys(locations)), workspace, jobs)
        indexes += _known_others(workspace, {index.path.name for index in indexes})
        DataIndex.combine(sorted(indexes, key=lambda index: index.path.name)).save(file)
        found[redact(folder)] = file
    return found


def _known_others(workspace: Path, names: set[str]) -> list[ShardIndex]:
    """The saved indexes of further shards in the folder."""
    found = []
    for file in workspace.glob("*.tar.index"):
        path = file.with_suffix("")
        index = None if path.name in names else ShardIndex.read(file, path)
        found += [] if index is None else [index]
    return found


def _index_all(locations: list[str], workspace: Path, jobs: int) -> list[ShardIndex]:
    problems: list[str] = []
    indexes: list[ShardIndex] = []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(locations), desc="indexing shards", unit="shard", disable=None) as bar,
    ):
        for outcome in pool.map(lambda location: _try_to_index(location, workspace), locations):
            if isinstance(outcome, str):
                problems.append(outcome)
            else:
                indexes.append(outcome)
            bar.update()
    refuse_unusable(problems, len(locations))
    return indexes


def _try_to_index(location: str, workspace: Path) -> ShardIndex | str:
    path = workspace / folder_and_name(location)[1]
    sidecar = path.with_name(path.name + ".index")
    try:
        known = ShardIndex.read(sidecar, path)
        if known is not None and object_size(location) in (None, known.shard_size):
            return known
        fetch(location, path, most=shutil.disk_usage(workspace).free)
        index = ShardIndex.build(path)
        index.save()
        return index
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"cannot copy {redact(location)} to {path}: {error.strerror}; {remedy(error)}"
    finally:
        path.unlink(missing_ok=True)
