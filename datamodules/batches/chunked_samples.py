"""The samples of a data set, divided into chunks of whole shards and into buckets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.batches.buckets import LEFT_OUT, Bucketing
from lit_lora.datamodules.batches.plan import split_shards
from lit_lora.datamodules.indexing.table import SampleTable


@dataclass(frozen=True, eq=False)
class ChunkedSamples:
    """Training samples of a :class:`~lit_lora.datamodules.batches.plan.Plan`, in chunks and buckets.

    Attributes:
        table: Table of all samples.
        shards: Numbers of the shards of each chunk.
        bucketing: Assignment of a size to each sample.
        held_out: Numbers of the samples that are not trained on, ascending.
        counts: Number of samples in each chunk and bucket, int64 (K, B).
        too_small: Number of samples that are excluded because they would have to be enlarged too much.
    """

    table: SampleTable
    shards: tuple[NDArray[np.int64], ...]
    bucketing: Bucketing
    held_out: NDArray[np.int64]
    counts: NDArray[np.int64]
    too_small: int

    @classmethod
    def split(
        cls,
        table: SampleTable,
        bucketing: Bucketing,
        num_chunks: int = 1,
        seed: int = 0,
        held_out: NDArray[np.int64] | None = None,
    ) -> ChunkedSamples:
        """Divide the samples of a table into chunks.

        Raises:
            UserError: If there are fewer shards than chunks.
        """
        held_out = np.empty(0, np.int64) if held_out is None else held_out
        shards = tuple(split_shards(np.diff(table.starts), num_chunks, seed))
        if not bucketing.needs_sizes:
            of_shard = np.diff(table.starts)
            of_shard -= np.bincount(np.searchsorted(table.starts, held_out, "right") - 1, minlength=len(of_shard))
            counts = np.array([[of_shard[part].sum()] for part in shards])
            return cls(table, shards, bucketing, held_out, counts, 0)
        counts = np.zeros((num_chunks, len(bucketing.sizes)), np.int64)
        too_small = 0
        for number, part in enumerate(shards):
            buckets = bucketing.assign(*table.image_sizes(part))
            buckets = buckets[~_are_in(table.samples(part), held_out)]
            counts[number] = np.bincount(buckets[buckets != LEFT_OUT], minlength=counts.shape[1])
            too_small += int((buckets == LEFT_OUT).sum())
        return cls(table, shards, bucketing, held_out, counts, too_small)

    @property
    def total(self) -> int:
        """Number of samples in the table."""
        return len(self.table)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Height and width of each bucket in pixels, int64 (B, 2)."""
        return self.bucketing.sizes

    @property
    def chunk_bytes(self) -> NDArray[np.int64]:
        """Bytes of each chunk's shards, int64 (K,)."""
        return np.array([self.table.shard_size[part].sum() for part in self.shards])

    def samples(self, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample numbers and buckets of a chunk, int64 (n,) both."""
        part = self.shards[chunk]
        samples = self.table.samples(part)
        if self.bucketing.needs_sizes:
            buckets = self.bucketing.assign(*self.table.image_sizes(part))
        else:
            buckets = np.zeros(len(samples), np.int64)
        kept = (buckets != LEFT_OUT) & ~_are_in(samples, self.held_out)
        return samples[kept], buckets[kept]


def _are_in(samples: NDArray[np.int64], some: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not len(some):
        return np.zeros(len(samples), bool)
    places = np.searchsorted(some, samples)
    return some[np.minimum(places, len(some) - 1)] == samples
