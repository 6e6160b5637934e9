"""The list of the shards of a folder, so that one that was lost or not copied is noticed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.files import atomic_file

MANIFEST = "manifest.json"
"""The file that is written when all shards of a folder are complete."""

_FORMAT = {"format": "lit_lora.shards", "version": 1}


def write_manifest(folder: Path, rows: Iterable[tuple[str, int, int]]) -> None:
    """List the shards of a folder, after all of them are complete.

    Args:
        folder: Folder of the shards.
        rows: Name, number of samples and size in bytes of each shard.
    """
    shards: list[dict[str, Any]] = [{"name": name, "samples": samples, "bytes": size} for name, samples, size in rows]
    totals = {key: sum(shard[key] for shard in shards) for key in ("samples", "bytes")}
    with atomic_file(folder / MANIFEST) as part:
        part.write_text(json.dumps(_FORMAT | totals | {"shards": shards}, indent=2) + "\n", encoding="utf-8")


def rows_of(folder: Path, index: DataIndex) -> list[tuple[str, int, int]]:
    """Name, number of samples and size of each shard of an index that is in the folder."""
    counts = [end - first for first, end in pairwise(index.sample_start.tolist())]
    rows = zip(index.names, counts, index.shard_size.tolist(), strict=True)
    return [row for row in rows if (folder / row[0]).exists()]


def missing_shards(folder: Path, names: Collection[str]) -> list[str]:
    """The shards that the manifest of a folder lists and that are not there; none if it has no readable one.

    Args:
        folder: Folder of the shards.
        names: Names of the files there.
    """
    if MANIFEST not in names:
        return []
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if any(listed[key] != value for key, value in _FORMAT.items()):
            return []
        there = set(names)
        return [name for shard in listed["shards"] if (name := str(shard["name"])) not in there]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
