"""The samples of all shards of a data set, as one numbered table."""

from __future__ import annotations

import hashlib
import posixpath
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.indexing.bounds import DTYPES, sample_bits
from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.scan import EXTENSIONS
from lit_lora.draws import seed_of
from lit_lora.errors import UserError
from lit_lora.redact import redact
from lit_lora.visible import visible

_MOST_VIEWS = 4096


class Span(NamedTuple):
    """Offset and size of a member's data in its shard, in bytes."""

    offset: int
    size: int


class SampleTable:
    """The samples (N) of shards (S), numbered in the order of the shards.

    It refers to memory-mapped indexes, of which only the accessed parts take memory.

    Args:
        shards: Location, index, and number in that index of each shard.

    Attributes:
        locations: Paths or URLs of the shards.
        shard_size: Sizes of the shards in bytes, int64 (S,).
        starts: Number of the first sample of each shard, and the total number of samples, int64 (S + 1,).
    """

    def __init__(self, shards: Sequence[tuple[str, DataIndex, int]]) -> None:
        self.locations = tuple(location for location, _, _ in shards)
        self._indexes: list[DataIndex] = []
        numbers: dict[int, int] = {}
        for _, index, _ in shards:
            if id(index) not in numbers:
                numbers[id(index)] = len(self._indexes)
                self._indexes.append(index)
        self._index_of = np.array([numbers[id(index)] for _, index, _ in shards])
        self._row_of = np.array([row for _, _, row in shards])
        counts = np.zeros(len(shards), np.int64)
        self.shard_size = np.zeros(len(shards), np.int64)
        for number, index in enumerate(self._indexes):
            here = self._index_of == number
            counts[here] = np.diff(index.sample_start)[self._row_of[here]]
            self.shard_size[here] = index.shard_size[self._row_of[here]]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self._ends: list[int] = self.starts[1:].tolist()  # searching a list takes a tenth of searching an array
        self._views: dict[int, ShardIndex] = {}

    @classmethod
    def of(cls, indexes: Sequence[ShardIndex]) -> SampleTable:
        """The table of the samples in indexed shards."""
        combined = DataIndex.combine(indexes)
        return cls([(str(index.path), combined, row) for row, index in enumerate(indexes)])

    @classmethod
    def join(cls, tables: Sequence[SampleTable]) -> SampleTable:
        """One table of the samples of several, in their order."""
        if len(tables) == 1:
            return tables[0]
        return cls(
            [
                (location, table._indexes[index], row)
                for table in tables
                for location, index, row in zip(
                    table.locations, table._index_of.tolist(), table._row_of.tolist(), strict=True
                )
            ]
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_views": {}}  # a pickled view would be a copy

    @property
    def digest(self) -> int:
        """A number that identifies the list of shards by file names and sample counts, independent of their location."""
        counts = np.diff(self.starts).tolist()
        names = (posixpath.basename(location.partition("?")[0]) for location in self.locations)
        return seed_of(*(f"{name} {count}" for name, count in zip(names, counts, strict=True)))

    @cached_property
    def key_digest(self) -> int:
        """A number that identifies the keys of all samples in their order."""
        digest = 0
        for index, first, end in self._runs(np.arange(len(self.locations))):
            digest = zlib.crc32(self._indexes[index].keys_crc32(first, end).data, digest)
        return digest

    def shard_digest(self, shard: int) -> str:
        """A checksum of a shard's index: of keys, image sizes, offsets and sizes of its members."""
        index = self._indexes[self._index_of[shard]].shard(int(self._row_of[shard]))
        digest = hashlib.blake2b(digest_size=16)
        for name in DTYPES:
            column = np.ascontiguousarray(getattr(index, name))
            digest.update(f"{name} {column.dtype.str} {len(column)} ".encode())
            digest.update(column.data)
        return "blake2b:" + digest.hexdigest()

    def shard_of(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return bisect_right(self._ends, sample)

    def key(self, sample: int) -> str:
        """The key of a sample."""
        index, local = self._find(sample)
        return index.key(local)

    def image_size(self, sample: int) -> tuple[int, int]:
        """Width and height of a sample's image after the rotation by EXIF, in pixels; (0, 0) if its header cannot be read."""
        index, local = self._find(sample)
        return int(index.width[local]), int(index.height[local])

    def spans(self, sample: int) -> dict[str, Span]:
        """The members of a sample by extension."""
        index, local = self._find(sample)
        low, high = np.searchsorted(index.member_sample, [local, local + 1]).tolist()
        return {
            EXTENSIONS[extension]: Span(offset, size)
            for extension, offset, size in zip(
                index.member_extension[low:high].tolist(),
                index.member_offset[low:high].tolist(),
                index.member_size[low:high].tolist(),
                strict=True,
            )
        }

    def image_sizes(self, shards: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Widths and heights of the images in the given shards, concatenated."""
        found = [self._indexes[index].image_sizes(first, end) for index, first, end in self._runs(shards)]
        width, height = (np.concatenate([np.empty(0, np.int32), *(one[side] for one in found)]) for side in (0, 1))
        self.release()
        return width, height

    def sizes_of(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Widths and heights of the images of some samples, whose numbers ascend."""
        shards = np.unique(np.searchsorted(self.starts, samples, "right") - 1)
        places = np.searchsorted(self.samples(shards), samples)
        width, height = self.image_sizes(shards)
        return width[places], height[places]

    def check_complete(self, what: str, extensions: Sequence[str]) -> None:
        """Check that each sample has at least one of these members.

        Args:
            what: Content of the members, for the message.
            extensions: Extensions of the members.

        Raises:
            UserError: If samples have none of them, or one of the extensions is not indexed.
        """
        unknown = [extension for extension in extensions if extension not in EXTENSIONS]
        if unknown:
            raise UserError(f".{unknown[0]} ({what}) is not indexed; use one of {', '.join(EXTENSIONS)}")
        bits = sum(1 << EXTENSIONS.index(extension) for extension in extensions)
        counts = np.zeros(len(self.locations), np.int64)
        for number, index in enumerate(self._indexes):
            here = self._index_of == number
            counts[here] = index.lacking(bits)[self._row_of[here]]
        if not counts.any():
            return
        shard = int(np.flatnonzero(counts)[0])
        columns = self._indexes[self._index_of[shard]].shard(int(self._row_of[shard]))
        lacks = (sample_bits(vars(columns)) & bits) == 0
        first = [visible(columns.key(sample)) for sample in np.flatnonzero(lacks)[:3].tolist()]
        raise UserError(
            f"{counts.sum()} of {len(self)} samples have no {what}"
            f" ({' or '.join(f'.{extension}' for extension in extensions)}); in {redact(self.locations[shard])}"
            f" {counts[shard]} of {len(columns)}, first {', '.join(first)};"
            " add the missing members or remove these samples"
        )

    def samples(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the samples in the given shards, concatenated."""
        starts, counts = self.starts[shards], np.diff(self.starts)[shards]
        return np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)

    def release(self) -> None:
        """Free the memory of the indexes' pages that were read."""
        for index in self._indexes:
            index.release()

    def _runs(self, shards: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Shards that follow each other in an index: the index, the first of its rows, and the end of the rows."""
        if not len(shards):
            return []
        indexes, rows = self._index_of[shards], self._row_of[shards]
        cuts = np.flatnonzero((np.diff(indexes) != 0) | (np.diff(rows) != 1)) + 1
        firsts, lasts = np.append(0, cuts), np.append(cuts, len(shards)) - 1
        return list(zip(indexes[firsts].tolist(), rows[firsts].tolist(), (rows[lasts] + 1).tolist(), strict=True))

    def nth(self, shards: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the samples at ``places`` in :meth:`samples` of ``shards``, without all of these in memory."""
        ends = np.cumsum(np.diff(self.starts)[shards])
        found = np.searchsorted(ends, places, "right")
        return self.starts[shards[found] + 1] - ends[found] + places

    def _find(self, sample: int) -> tuple[ShardIndex, int]:
        shard = self.shard_of(sample)
        view = self._views.get(shard)
        if view is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            view = self._views[shard] = self._indexes[self._index_of[shard]].shard(int(self._row_of[shard]))
        return view, sample - int(self.starts[shard])
