"""The samples of a data set, divided into chunks of whole shards and into buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.batches.buckets import LEFT_OUT, Bucketing
from lit_lora.datamodules.batches.plan import split_shards
from lit_lora.datamodules.batches.repeats import Repeats
from lit_lora.datamodules.indexing.table import SampleTable

# Makes the choice of repeated samples independent of other draws from the same seed; `plan` has the numbers before.
_PARTS = 5

_BLOCK = 1 << 20
"""Samples whose buckets are counted at a time, which bounds the memory."""


@dataclass(frozen=True, eq=False)
class ChunkedSamples:
    """Training samples of a :class:`~lit_lora.datamodules.batches.plan.Plan`, in chunks and buckets.

    Attributes:
        table: Table of all samples.
        shards: Numbers of the shards of each chunk.
        bucketing: Assignment of a size to each sample.
        held_out: Numbers of the samples that are not trained on, ascending.
        repeats: Number of times that a round shows the samples of each set (S).
        available: Number of different samples in each set, chunk and bucket, int64 (S, K, B).
        parts: Number of them that are shown once more than the others, int64 (S, K, B).
        too_small: Number of samples that are excluded because they would have to be enlarged too much.
        seed: Seed of the choice of samples that are shown once more.
    """

    table: SampleTable
    shards: tuple[NDArray[np.int64], ...]
    bucketing: Bucketing
    held_out: NDArray[np.int64]
    repeats: Repeats
    available: NDArray[np.int64]
    parts: NDArray[np.int64]
    too_small: int
    seed: int

    @classmethod
    def split(
        cls,
        table: SampleTable,
        bucketing: Bucketing,
        num_chunks: int = 1,
        seed: int = 0,
        held_out: NDArray[np.int64] | None = None,
        repeats: Repeats | None = None,
    ) -> ChunkedSamples:
        """Divide the samples of a table into chunks.

        Raises:
            UserError: If there are fewer shards than chunks.
        """
        held_out = np.empty(0, np.int64) if held_out is None else held_out
        of_shard = np.diff(table.starts)
        repeats = repeats or Repeats.once(len(of_shard))
        in_sets = np.bincount(repeats.set_of_shard, of_shard, len(repeats.times)).astype(np.int64)
        shown = of_shard * repeats.resolved(in_sets).times[repeats.set_of_shard]
        shards = tuple(split_shards(shown, num_chunks, seed))
        available = np.zeros((len(repeats.times), num_chunks, len(bucketing.sizes)), np.int64)
        too_small = 0
        if not bucketing.needs_sizes:
            of_shard -= np.bincount(np.searchsorted(table.starts, held_out, "right") - 1, minlength=len(of_shard))
            for number, part in enumerate(shards):
                available[:, number, 0] = np.bincount(repeats.set_of_shard[part], of_shard[part], len(available))
        else:
            available, too_small = _count(table, bucketing, shards, held_out, repeats)
        repeats = repeats.resolved(available.sum(axis=(1, 2)))
        parts = repeats.parts(available.reshape(len(available), -1)).reshape(available.shape)
        return cls(table, shards, bucketing, held_out, repeats, available, parts, too_small, seed)

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

    @property
    def copies(self) -> int:
        """Most times that a round shows a sample."""
        return self.repeats.copies

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Number of samples that a round shows in each chunk and bucket, int64 (K, B)."""
        total: NDArray[np.int64] = (self.repeats.whole[:, None, None] * self.available + self.parts).sum(axis=0)
        return total

    def samples(self, chunk: int, turn: int = 0) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """The samples that a round shows, each as ``copy * total + sample``, int64 (n,), and their buckets (n,).

        Args:
            chunk: Number of the chunk.
            turn: Number of the round, on which the part of a set depends that is shown once more than the rest.
        """
        part = self.shards[chunk]
        samples = self.table.samples(part)
        if self.bucketing.needs_sizes:
            buckets = self.bucketing.assign(*self.table.image_sizes(part))
        else:
            buckets = np.zeros(len(samples), self.bucketing.dtype)
        kept = buckets != LEFT_OUT
        places = np.minimum(np.searchsorted(samples, self.held_out), len(samples) - 1)
        kept[places[samples[places] == self.held_out]] = False
        if self.repeats.digest is None:
            return samples[kept], buckets[kept]
        samples, buckets, sets = samples[kept], buckets[kept], _sets(self.table, self.repeats, part)[kept]
        times = self.repeats.whole[sets]
        rows = [np.repeat(np.arange(len(samples)), times)]
        copies = [np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)]
        for number, bucket in np.argwhere(self.parts[:, chunk]).tolist():
            members = np.flatnonzero((sets == number) & (buckets == bucket))
            order = np.random.default_rng([self.seed, _PARTS, chunk, number, bucket]).permutation(members)
            count = int(self.parts[number, chunk, bucket])
            rows.append(order[(turn * count + np.arange(count)) % len(order)])
            copies.append(np.full(count, self.repeats.whole[number]))
        shown = np.concatenate(rows)
        return np.concatenate(copies) * self.total + samples[shown], buckets[shown]


def _sets(table: SampleTable, repeats: Repeats, shards: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the sets of the samples in some shards, int64 (n,)."""
    return np.repeat(repeats.set_of_shard[shards], np.diff(table.starts)[shards])


def _count(
    table: SampleTable,
    bucketing: Bucketing,
    shards: Sequence[NDArray[np.int64]],
    held_out: NDArray[np.int64],
    repeats: Repeats,
) -> tuple[NDArray[np.int64], int]:
    """Number of different samples in each set, chunk and bucket, int64 (S, K, B), and of those that are too small."""
    shape = (len(repeats.times), len(shards), len(bucketing.sizes) + 1)  # bucket 0 of these is LEFT_OUT
    group = np.empty(len(table.locations), np.int64)
    for number, part in enumerate(shards):
        group[part] = (repeats.set_of_shard[part] * shape[1] + number) * shape[2] - LEFT_OUT
    of_shard = np.diff(table.starts)
    counts = np.zeros(shape, np.int64).reshape(-1)
    # In the order of the shards, since each chunk is spread over the whole index.
    cuts = np.searchsorted(table.starts, np.arange(_BLOCK, len(table), _BLOCK))
    for block in np.split(np.arange(len(group)), cuts):
        buckets = bucketing.assign(*table.image_sizes(block))
        counts += np.bincount(np.repeat(group[block], of_shard[block]) + buckets, minlength=len(counts))
    if len(held_out):
        of_held_out = np.searchsorted(table.starts, held_out, "right") - 1
        buckets = bucketing.assign(*table.sizes_of(held_out))
        counts -= np.bincount(group[of_held_out] + buckets, minlength=len(counts))
    by_bucket = counts.reshape(shape)
    return by_bucket[..., 1:].copy(), int(by_bucket[..., 0].sum())
