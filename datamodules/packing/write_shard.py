"""Tar shards whose bytes depend on their samples alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.files import atomic_file


class _NothingToWriteError(Exception):
    """There are no samples; raised so that no empty file is left."""


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], tar_format: int) -> ShardIndex | None:
    """Write a shard and its index atomically.

    Args:
        path: The shard.
        samples: The key of each sample, and its members by extension.
        tar_format: ``tarfile.USTAR_FORMAT``, or ``tarfile.PAX_FORMAT`` where keys may be long or not ASCII.

    Returns:
        The index; None where there are no samples, which leaves no file.
    """
    written = 0
    try:
        with atomic_file(path) as part:
            with tarfile.open(part, "w", format=tar_format) as archive:
                for key, members in samples:
                    for extension, data in members.items():
                        archive.addfile(_header(f"{key}.{extension}", len(data)), io.BytesIO(data))
                    written += 1
            if not written:
                raise _NothingToWriteError
            index = ShardIndex.build(part)
            assert len(index) == written
    except _NothingToWriteError:
        return None
    index = index.moved_to(path)
    index.save()
    return index


def _header(name: str, size: int) -> tarfile.TarInfo:
    """A header without anything that differs between two runs or machines."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mtime = 0
    info.mode = 0o644
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info
