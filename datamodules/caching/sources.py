"""The shards that a cache was made from, which may be changed or replaced later."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.files import atomic_file
from lit_lora.redact import redact

_LOOKED_AT = 1000
"""Most shards whose times are compared when training starts: on a network's disk each takes a millisecond."""

_COMPARED_BYTES = 256 << 20
"""Shards with other times whose content is compared when training starts, in bytes: a second or less. One always is."""

_FORMAT = {"format": "lit_lora.cache_source", "version": 1}


@dataclass(frozen=True)
class SourceRecord:
    """The shard that a cached shard was made from, saved beside that in ``NAME.tar.source.json``.

    Attributes:
        path: Path of the shard, relative to the folder of the cached shard; None if it was not on a local disk.
        size: Size of the shard in bytes.
        mtime_ns: Its modification time in nanoseconds; None if it was not on a local disk.
        content: Checksum of its bytes; None if it was not on a local disk.
        index: Checksum of its index: keys, offsets and sizes of all members.
        cache: :meth:`~lit_lora.datamodules.caching.latent_cache.CacheDescription.checksum` of the cache that the cached shard was
            made for; None in caches of earlier versions.
    """

    path: str | None
    size: int
    mtime_ns: int | None
    content: str | None
    index: str
    cache: str | None = None

    @classmethod
    def of(cls, table: SampleTable, shard: int, cached: Path, cache: str | None) -> SourceRecord:
        """The record of a shard.

        Args:
            table: Table with the shard.
            shard: Number of the shard in the table.
            cached: Cached shard.
            cache: Checksum of the cache's description.
        """
        location, index = table.locations[shard], table.shard_digest(shard)
        if is_remote(location):
            return cls(None, int(table.shard_size[shard]), None, None, index, cache)
        source = Path(location).absolute()
        stat = source.stat()
        path = os.path.relpath(source, cached.parent.absolute())
        return cls(path, stat.st_size, stat.st_mtime_ns, _checksum(source), index, cache)

    @classmethod
    def read(cls, cached: Path) -> SourceRecord | None:
        """The record beside a cached shard; None if there is no readable one, as in caches of earlier versions."""
        try:
            document = json.loads(record_path(cached).read_text(encoding="utf-8"))
            if {name: document.pop(name, None) for name in _FORMAT} != _FORMAT:
                return None
            return cls(**document)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, cached: Path) -> None:
        """Write the record beside a cached shard."""
        with atomic_file(record_path(cached)) as part:
            part.write_text(json.dumps(_FORMAT | asdict(self), indent=2) + "\n", encoding="utf-8")

    def has_times_of(self, source: Path) -> bool:
        """Whether size and modification time of a shard are as they were."""
        stat = source.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)

    def has_content_of(self, source: Path) -> bool:
        """Whether a shard holds the same bytes; it is not read if its size differs."""
        return source.stat().st_size == self.size and _checksum(source) == self.content

    def is_of(self, table: SampleTable, shard: int) -> bool:
        """Whether a shard is still the one of the record; of one that is or was remote, the index is compared."""
        location = table.locations[shard]
        if is_remote(location) or self.content is None:
            return self.index == table.shard_digest(shard)
        source = Path(location)
        return self.has_times_of(source) or self.has_content_of(source)


def record_path(cached: Path) -> Path:
    """The file with the record of a cached shard."""
    return cached.with_name(cached.name + ".source.json")


def is_newer(source: str, cached: Path) -> bool:
    """Whether a shard was changed after its cached shard was complete, of which there is no record.

    Args:
        source: Location of the shard; one that is not on a local disk is not newer.
        cached: Existing cached shard.
    """
    return not is_remote(source) and Path(source).stat().st_mtime_ns > cached.stat().st_mtime_ns


def looked_at(locations: Sequence[str]) -> Sequence[str]:
    """Some of many shards, evenly spread, which are looked at when training starts."""
    return locations[:: math.ceil(len(locations) / _LOOKED_AT) or 1]


@rank_zero_only
def warn_of_changed_sources(locations: Sequence[str]) -> None:
    """Warn of cached shards whose sources, where they can be found, are not those that the cache was made from.

    Of many shards it looks at some. A source with another time counts as changed only if its content differs.

    Args:
        locations: Locations of cached shards.
    """
    some = looked_at(locations)
    changed: list[Path] = []
    others: list[tuple[Path, SourceRecord]] = []
    for source, cached, record in _sources(some):
        if record is None:
            changed += [source] if is_newer(str(source), cached) else []
        elif source.stat().st_size != record.size:
            changed.append(source)
        elif not record.has_times_of(source):
            others.append((source, record))
    compared, read = 0, 0
    for source, record in others:
        if compared and read + record.size > _COMPARED_BYTES:
            break
        compared, read = compared + 1, read + record.size
        changed += [] if record.has_content_of(source) else [source]
    if changed:
        rank_zero_warn(
            f"{len(changed)} of {len(some)} shards that were looked at, among them {redact(str(changed[0]))}, were changed after"
            " the cache was made from them, so that training may read older captions and images; remove their cached shards and"
            " run lit-lora cache again"
        )
    if compared < len(others):
        rank_zero_warn(
            f"{len(others)} shards have other times than when they were cached, as after a copy; {compared} of them were"
            " compared, the others may hold other captions and images: lit-lora cache compares all and keeps the new times"
        )


def _sources(locations: Sequence[str]) -> Iterator[tuple[Path, Path, SourceRecord | None]]:
    """Yield sources that exist on a local disk, each with its cached shard and its record.

    Without a record they are in the folder above, as ``lit-lora cache`` puts them.
    """
    for cached in (Path(location) for location in locations if not is_remote(location)):
        record = SourceRecord.read(cached)
        if record is not None and record.path is None:
            continue
        relative = f"../{cached.name}" if record is None else str(record.path)
        source = Path(os.path.normpath(cached.parent.absolute() / relative))  # before links: a cache may be a link
        if source.is_file() and os.access(source, os.R_OK):
            yield source, cached, record


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return "blake2b:" + hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
