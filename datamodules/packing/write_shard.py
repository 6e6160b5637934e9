"""Writing of tar shards whose bytes depend only on their samples."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.files import atomic_file


class _NothingToWriteError(Exception):
    """There are no samples; raised so that atomic_file discards the empty file."""


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], tar_format: int) -> ShardIndex | None:
    """Write a shard and its index atomically.

    Args:
        path: Path of the shard.
        samples: Key of each sample, and its members by extension.
        tar_format: ``tarfile.USTAR_FORMAT``, or ``tarfile.PAX_FORMAT`` if keys may be long or not ASCII.

    Returns:
        The index; None if there are no samples, in which case no file is written.
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
    """A tar header that is the same for all runs and machines."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mtime = 0
    info.mode = 0o644
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info
