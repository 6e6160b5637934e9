"""The plan of all batches: which samples each batch contains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.batches.cursor import Cursor, Segment
from lit_lora.datamodules.batches.global_batch import GlobalBatch
from lit_lora.datamodules.batches.planned_samples import PlannedSamples
from lit_lora.errors import UserError

Leftovers = Literal["drop", "pad"]

# Make permutations that are drawn from the same seed independent.
_SHARDS, _CHUNKS, _SAMPLES, _BATCHES = 1, 2, 3, 4

_REPEATS_FROM_BIT = 20

MAX_BATCH_SIZE = 1 << 16
"""Maximum number of samples in a batch of one process."""

MAX_PASSES = 1 << _REPEATS_FROM_BIT
"""Number of passes for which a slot leaves room."""


def split_shards(
    sample_counts: NDArray[np.int64] | NDArray[np.float64], num_chunks: int, seed: int
) -> list[NDArray[np.int64]]:
    """Distribute shards at random over chunks of about the same number of samples.

    All passes have the same chunks, and so the same number of batches.

    Args:
        sample_counts: Number of samples in each shard, repeats included, (S,).
        num_chunks: Number of chunks, K.
        seed: Seed of the distribution.

    Returns:
        K ascending arrays of shard numbers.

    Raises:
        UserError: If there are fewer shards than chunks.
    """
    num_shards = len(sample_counts)
    if not 1 <= num_chunks <= num_shards:
        raise UserError(
            f"chunks.count={num_chunks} exceeds the number of shards, {num_shards}; choose at most {num_shards} or pack"
            " smaller shards"
        )
    order = np.random.default_rng([seed, _SHARDS]).permutation(num_shards)
    ends = np.cumsum(sample_counts[order])
    cuts = [0]
    for number in range(1, num_chunks):
        nearest = int(np.searchsorted(ends, ends[-1] * number / num_chunks + sample_counts.mean() / 2))
        cuts.append(min(max(nearest, cuts[-1] + 1), num_shards - num_chunks + number))
    return [np.sort(part) for part in np.split(order, cuts[1:])]


def chunk_order(seed: int, pass_number: int, num_chunks: int, shuffle: bool = True) -> NDArray[np.int64]:
    """The order in which a pass visits the chunks, int64 (K,)."""
    if not shuffle:
        return np.arange(num_chunks)
    return np.random.default_rng([seed, _CHUNKS, pass_number]).permutation(num_chunks)


class _Round(NamedTuple):
    """The batches of a round that follow all segments but the last; ``rows`` (n, G) are indices into ``samples``."""

    samples: NDArray[np.int64]
    buckets: NDArray[np.integer]
    rows: NDArray[np.integer]
    valid: NDArray[np.int64]


class Plan:
    """The batches of every pass over the data, as a pure function of the arguments.

    The plan does not depend on the number of processes or loader workers, so a resumed run can change both. It can also change
    the global batch size: the samples that the round has consumed are computed, and the others are planned anew.

    Args:
        chunks: Samples in chunks and buckets.
        global_batch_size: Samples in a batch over all processes, G.
        seed: Seed of the order. Defaults to 0.
        shuffle: Whether to draw a new order for each pass. Defaults to True; otherwise samples keep their order.
        leftovers: Treatment of the samples of a bucket that do not fill a batch: ``"drop"`` (default) drops them for the round,
            ``"pad"`` fills their batch with samples of weight 0.
        passes_per_chunk: Number of rounds in a visit. Defaults to 1.
        steps_per_chunk: Number of batches in a visit, instead of ``passes_per_chunk``; it takes as many rounds as it needs.

    Raises:
        UserError: If there are no samples, or leftovers are dropped and a chunk has too few samples for one batch.
    """

    def __init__(
        self,
        chunks: PlannedSamples,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        leftovers: Leftovers = "drop",
        passes_per_chunk: int = 1,
        steps_per_chunk: int | None = None,
    ) -> None:
        self.chunks = chunks
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.leftovers = leftovers
        self.passes_per_chunk = passes_per_chunk
        self.steps_per_chunk = steps_per_chunk
        self.num_samples = int(chunks.counts.sum())
        self.num_chunks = len(chunks.counts)
        self.batches_per_round = self.count_batches(chunks.counts).sum(axis=1)
        """Number of batches in one round of each chunk, int64 (K,)."""
        if not self.num_samples:
            raise UserError("there are no samples to plan; add data")
        if not self.batches_per_round.all():
            raise UserError(self._too_few())
        if steps_per_chunk is None:
            self.batches_per_visit = self.batches_per_round * passes_per_chunk
        else:
            self.batches_per_visit = np.full(self.num_chunks, steps_per_chunk)
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._round: tuple[tuple[int, int, tuple[Segment, ...]], _Round] | None = None

    @property
    def batches_per_pass(self) -> int:
        """Number of batches in a full pass."""
        return int(self.batches_per_visit.sum())

    @property
    def samples_per_round(self) -> int:
        """Number of samples in the batches of one round of all chunks; the others are dropped."""
        return int(self._samples_in_round.sum())

    @property
    def samples_per_pass(self) -> int:
        """Number of samples in the batches of a pass, including repeats and excluding padding."""
        rounds = self.batches_per_visit / self.batches_per_round
        return math.floor((self._samples_in_round * rounds).sum())

    @property
    def _samples_in_round(self) -> NDArray[np.int64]:
        """Number of samples in the batches of one round of each chunk, int64 (K,)."""
        places = self.count_batches(self.chunks.counts) * self.global_batch_size
        return np.minimum(places, self.chunks.counts).sum(axis=1)

    @property
    def padding_per_round(self) -> int:
        """Number of samples of weight 0 in the batches of one round of all chunks."""
        return int(self.batches_per_round.sum()) * self.global_batch_size - self.samples_per_round

    def start(self) -> Cursor:
        """The position of the first batch."""
        return self._settle(Cursor(0, 0, 0, 0, 0, (Segment(self.global_batch_size, 0),)))

    def resume(self, cursor: Cursor) -> Cursor:
        """The position in this plan that continues a run which may have had another global batch size."""
        taken = tuple(segment for segment in cursor.segments if segment.batches)
        if not taken or taken[-1].global_batch_size != self.global_batch_size:
            taken = (*taken, Segment(self.global_batch_size, 0))
        return self._settle(cursor._replace(segments=taken))

    def remaining(self, cursor: Cursor) -> int:
        """Number of batches from a position to the end of the pass."""
        order = self._order(cursor.pass_number)
        chunk = order[cursor.position]
        if self.steps_per_chunk is not None:
            here = int(self.batches_per_visit[chunk]) - cursor.visit_batches
        else:
            rounds = self.passes_per_chunk - 1 - cursor.repeat
            here = self._left_in_round(cursor) + rounds * int(self.batches_per_round[chunk])
        return here + int(self.batches_per_visit[order[cursor.position + 1 :]].sum())

    def walk(self, cursor: Cursor) -> Iterator[tuple[GlobalBatch, Cursor]]:
        """Yield the batches from a position to the end of the pass, each with the position after it."""
        pass_number = cursor.pass_number
        while cursor.pass_number == pass_number:
            batch = self._batch(cursor)
            cursor = self._after(cursor)
            yield batch, cursor

    def visit(self, cursor: Cursor) -> int:
        """Number of the visit at a position."""
        return cursor.pass_number * self.num_chunks + cursor.position

    def chunk(self, cursor: Cursor) -> int:
        """Number of the chunk at a position."""
        return int(self._order(cursor.pass_number)[cursor.position])

    def _too_few(self) -> str:
        chunk = int(np.argmin(self.batches_per_round))
        counts = self.chunks.counts[chunk]
        where = "" if self.num_chunks == 1 else f" of chunk {chunk}, one of {self.num_chunks},"
        where += "" if len(counts) == 1 else f" in {len(counts)} buckets, at most {counts.max()} in one,"
        samples, do = ("sample", "does") if counts.sum() == 1 else ("samples", "do")
        return (
            f"{counts.sum()} {samples}{where} {do} not fill one batch of {self.global_batch_size}"
            " (batch_size times the number of processes);"
            " lower batch_size, use fewer processes, chunks or buckets, add data, or set chunks.leftovers to pad"
        )

    def count_batches(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of batches in one round, for the number of samples in each chunk and bucket."""
        if self.leftovers == "pad":
            return -(-counts // self.global_batch_size)
        return counts // self.global_batch_size

    def _order(self, pass_number: int) -> NDArray[np.int64]:
        if pass_number not in self._orders:
            self._orders = {pass_number: chunk_order(self.seed, pass_number, self.num_chunks, self.shuffle)}
        return self._orders[pass_number]

    def _left_in_round(self, cursor: Cursor) -> int:
        if len(cursor.segments) == 1:  # the usual case, without planning the round
            return int(self.batches_per_round[self.chunk(cursor)]) - cursor.segments[0].batches
        return len(self._plan_round(cursor).rows) - cursor.segments[-1].batches

    def _after(self, cursor: Cursor) -> Cursor:
        *before, last = cursor.segments
        return self._settle(
            cursor._replace(
                pass_batches=cursor.pass_batches + 1,
                visit_batches=cursor.visit_batches + 1,
                segments=(*before, last._replace(batches=last.batches + 1)),
            )
        )

    def _settle(self, cursor: Cursor) -> Cursor:
        """Advance from the end of a round, visit or pass to the next position that has a batch."""
        fresh = (Segment(self.global_batch_size, 0),)
        while True:
            if self._visit_is_over(cursor):
                if cursor.position + 1 < self.num_chunks:
                    cursor = Cursor(cursor.pass_number, cursor.position + 1, 0, cursor.pass_batches, 0, fresh)
                else:
                    cursor = Cursor(cursor.pass_number + 1, 0, 0, 0, 0, fresh)
            elif self._left_in_round(cursor) <= 0:
                cursor = cursor._replace(repeat=cursor.repeat + 1, segments=fresh)
            else:
                return cursor

    def _visit_is_over(self, cursor: Cursor) -> bool:
        if self.steps_per_chunk is not None:
            return cursor.visit_batches >= self.steps_per_chunk
        return cursor.repeat >= self.passes_per_chunk

    def _batch(self, cursor: Cursor) -> GlobalBatch:
        planned = self._plan_round(cursor)
        number = cursor.segments[-1].batches
        rows = planned.rows[number]
        shown = planned.samples[rows]  # each is a copy of a sample, see PlannedSamples
        occurrence = cursor.pass_number + (cursor.repeat << _REPEATS_FROM_BIT)
        height, width = self.chunks.sizes[planned.buckets[rows[0]]].tolist()
        return GlobalBatch(
            shown % self.chunks.total,
            (np.arange(len(rows)) < planned.valid[number]).astype(np.float32),
            occurrence * self.chunks.copies * self.chunks.total + shown,
            (height, width),
            self.visit(cursor),
        )

    def _plan_round(self, cursor: Cursor) -> _Round:
        *before, last = cursor.segments
        key = (self.visit(cursor), cursor.repeat, (*before, Segment(last.global_batch_size, 0)))
        if self._round is None or self._round[0] != key:
            self._round = (key, self._make_round(cursor))
        return self._round[1]

    def _make_round(self, cursor: Cursor) -> _Round:
        chunk = self.chunk(cursor)
        samples, buckets = self.chunks.samples(chunk, cursor.pass_number + cursor.repeat)
        seed = [self.seed, _SAMPLES, cursor.pass_number, chunk, cursor.repeat]
        rest: NDArray[np.integer] = np.arange(len(samples), dtype=np.int32 if len(samples) < 1 << 31 else np.int64)
        if self.shuffle:
            rest = np.random.default_rng(seed).permutation(rest)
        for number, segment in enumerate(cursor.segments):
            rows, valid = self._group(rest, buckets, segment.global_batch_size)
            if self.shuffle:
                seed = [self.seed, _BATCHES, cursor.pass_number, chunk, cursor.repeat, number]
                order = np.random.default_rng(seed).permutation(len(rows))
                rows, valid = rows[order], valid[order]
            if number + 1 < len(cursor.segments):
                taken = np.zeros(len(samples), bool)
                real = np.arange(segment.global_batch_size) < valid[: segment.batches, None]
                taken[rows[: segment.batches][real]] = True
                rest = rest[~taken[rest]]
        return _Round(samples, buckets, rows, valid)

    def _group(
        self, rest: NDArray[np.integer], buckets: NDArray[np.integer], size: int
    ) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Batches of one bucket each: rows of ``rest``, (n, G), and the number of unpadded samples in each, int64 (n,)."""
        of_rest = buckets[rest]
        order = np.argsort(of_rest, kind="stable")
        by_bucket, present = rest[order], of_rest[order]
        starts = np.flatnonzero(present[1:] != present[:-1]) + 1
        rows = [np.empty((0, size), rest.dtype)]
        valid = [np.empty(0, np.int64)]
        for members in np.split(by_bucket, starts):
            full, left = divmod(len(members), size)
            rows.append(members[: full * size].reshape(full, size))
            valid.append(np.full(full, size))
            if left and self.leftovers == "pad":
                # The leftover samples come first, followed by repeated samples of the bucket.
                padded = np.concatenate([members[-left:], members[: size - left]]) if full else members
                rows.append(np.resize(padded, (1, size)))
                valid.append(np.array([left]))
        return np.concatenate(rows), np.concatenate(valid)
