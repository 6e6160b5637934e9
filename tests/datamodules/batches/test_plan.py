from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_lora.datamodules import Plan
from lit_lora.datamodules.batches.cursor import Cursor, Segment
from lit_lora.datamodules.batches.plan import chunk_order, split_shards
from lit_lora.errors import UserError
from tests.datamodules.one_chunk import OneChunk


@dataclass(frozen=True)
class Chunked:
    """Listed samples in chunks and buckets: ``buckets[chunk]`` holds the bucket of each sample of the chunk."""

    buckets: tuple[tuple[int, ...], ...]
    num_buckets: int
    copies: int = 1

    @property
    def total(self) -> int:
        return sum(len(chunk) for chunk in self.buckets)

    @property
    def counts(self) -> Any:
        return np.array([np.bincount(np.array(chunk, int), minlength=self.num_buckets) for chunk in self.buckets])

    @property
    def sizes(self) -> Any:
        return np.array([[8, 8 + bucket] for bucket in range(self.num_buckets)])

    def samples(self, chunk: int, turn: int = 0) -> Any:
        first = sum(len(earlier) for earlier in self.buckets[:chunk])
        here = np.array(self.buckets[chunk], int)
        return first + np.arange(len(here)), here


@st.composite
def chunked(draw):
    num_buckets = draw(st.integers(1, 4))
    chunk = st.lists(st.integers(0, num_buckets - 1), min_size=1, max_size=25).map(tuple)
    return Chunked(tuple(draw(st.lists(chunk, min_size=1, max_size=4))), num_buckets)


sizes = st.integers(1, 9)
kinds = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**40),
        "shuffle": st.booleans(),
        "leftovers": st.sampled_from(["drop", "pad"]),
        "passes_per_chunk": st.integers(1, 3),
    }
)


def _plan(chunks, size, **kind):
    if kind["leftovers"] == "drop" and (chunks.counts < size).all(axis=1).any():
        with pytest.raises(UserError, match="not fill one batch"):
            Plan(chunks, size, **kind)
        return None
    return Plan(chunks, size, **kind)


def _pass(plan, number):
    start = plan.start()
    assert start.pass_number == 0
    cursor = Cursor(number, start.position, 0, 0, 0, start.segments)
    return [batch for batch, _ in plan.walk(plan.resume(cursor))]


def _shown(batches):
    return [int(slot) for batch in batches for slot, weight in zip(batch.slots, batch.weights, strict=True) if weight]


@given(chunked(), sizes, kinds, st.integers(0, 50))
def test_a_pass_is_a_partition_up_to_leftovers(chunks, size, kind, number):
    plan = _plan(chunks, size, **kind)
    if plan is None:
        return
    batches = _pass(plan, number)
    shown = _shown(batches)
    repeats = kind["passes_per_chunk"]

    assert len(batches) == plan.batches_per_pass
    assert len(shown) == len(set(shown))
    counts = np.bincount([slot % chunks.total for slot in shown], minlength=chunks.total)
    if kind["leftovers"] == "pad":
        assert (counts == repeats).all()
    else:
        lost = chunks.counts - chunks.counts // size * size
        assert (counts <= repeats).all()
        assert counts.sum() == repeats * (chunks.total - lost.sum()) == repeats * plan.samples_per_round
    assert sum(int((batch.weights == 0).sum()) for batch in batches) == repeats * plan.padding_per_round


@given(chunked(), sizes, kinds, st.integers(0, 50))
def test_a_batch_is_full_and_of_one_bucket_and_chunk(chunks, size, kind, number):
    plan = _plan(chunks, size, **kind)
    if plan is None:
        return
    bucket_of = [bucket for chunk in chunks.buckets for bucket in chunk]
    chunk_of = [number for number, chunk in enumerate(chunks.buckets) for _ in chunk]
    order = chunk_order(plan.seed, number, plan.num_chunks, plan.shuffle)
    visits = []
    for batch in _pass(plan, number):
        assert [column.shape for column in batch[:3]] == [(size,)] * 3
        assert [column.dtype for column in batch[:3]] == [np.int64, np.float32, np.int64]
        assert {(8, 8 + bucket_of[sample]) for sample in batch.samples} == {batch.size}
        assert {chunk_of[sample] for sample in batch.samples} == {order[batch.visit - number * plan.num_chunks]}
        assert batch.weights[0] == 1
        visits.append(batch.visit)
    assert visits == sorted(visits)


@given(chunked(), sizes, kinds)
def test_resuming_at_any_position_gives_the_same_batches(chunks, size, kind):
    plan = _plan(chunks, size, **kind)
    if plan is None:
        return
    whole = list(plan.walk(plan.start()))
    again = Plan(chunks, size, **kind)
    for number in reversed(range(len(whole) - 1)):
        cursor = whole[number][1]
        assert again.resume(cursor) == cursor
        assert again.remaining(cursor) == len(whole) - number - 1
        batch, after = next(again.walk(cursor))
        assert after == whole[number + 1][1]
        assert all(np.array_equal(a, b) for a, b in zip(batch, whole[number + 1][0], strict=True))


@given(chunked(), st.lists(st.tuples(sizes, st.integers(0, 6)), min_size=1, max_size=4), sizes, kinds)
@settings(max_examples=300)
def test_other_batch_sizes_neither_repeat_nor_lose_samples(chunks, stretches, last, kind):
    kind = kind | {"leftovers": "pad"}
    cursor, batches = None, []
    for size, count in [*stretches, (last, 10**9)]:
        plan = Plan(chunks, size, **kind)
        cursor = plan.start() if cursor is None else plan.resume(cursor)
        if cursor.pass_number:
            break
        before, remaining = len(batches), plan.remaining(cursor)
        for batch, after in plan.walk(cursor):
            if len(batches) - before == count:
                break
            assert len(batch.samples) == size
            batches.append(batch)
            cursor = after
        assert cursor.pass_number == 1 or len(batches) - before == count
        assert count != 10**9 or len(batches) - before == remaining
    assert cursor.pass_number == 1
    counts = np.bincount([slot % chunks.total for slot in _shown(batches)], minlength=chunks.total)
    assert (counts == kind["passes_per_chunk"]).all()
    assert len(set(_shown(batches))) == len(_shown(batches))


@given(chunked(), st.tuples(sizes, st.integers(0, 6)), sizes, kinds)
def test_other_batch_sizes_drop_less_than_a_batch_of_each_bucket(chunks, stretch, last, kind):
    kind = kind | {"leftovers": "drop", "passes_per_chunk": 1}
    first, second = _plan(chunks, stretch[0], **kind), _plan(chunks, last, **kind)
    if None in (first, second) or first.batches_per_pass <= stretch[1]:
        return
    walked = list(first.walk(first.start()))[: stretch[1]]
    cursor = second.resume(walked[-1][1] if walked else first.start())
    rest = [batch for batch, _ in second.walk(cursor)] if cursor.pass_number == 0 else []
    shown = _shown([*(batch for batch, _ in walked), *rest])

    assert len(shown) == len(set(shown))
    # A chunk that the first size went through to its end has lost its leftovers of that size.
    for chunk in range(len(chunks.buckets)):
        samples, buckets = chunks.samples(chunk)
        for bucket in range(chunks.num_buckets):
            lost = set(samples[buckets == bucket].tolist()) - set(shown)
            assert len(lost) < max(stretch[0], last)


@given(chunked(), sizes, kinds, st.integers(1, 12))
def test_steps_per_chunk(chunks, size, kind, steps):
    kind = kind | {"passes_per_chunk": 1}
    if _plan(chunks, size, **kind) is None:
        return
    plan = Plan(chunks, size, **kind, steps_per_chunk=steps)
    batches = _pass(plan, 2)
    rounds = Plan(chunks, size, **kind).batches_per_round

    visits = [batch.visit - 2 * plan.num_chunks for batch in batches]
    order = chunk_order(plan.seed, 2, plan.num_chunks, plan.shuffle)
    assert len(batches) == plan.batches_per_pass == steps * np.count_nonzero(rounds)
    assert visits == [place for place in range(plan.num_chunks) if rounds[order[place]] for _ in range(steps)]
    slots = _shown(batches)
    assert len(slots) == len(set(slots))
    middle = list(plan.walk(plan.start()))
    for number, (_, cursor) in enumerate(middle[:-1]):
        assert plan.remaining(cursor) == len(middle) - number - 1


def test_samples_per_pass_of_chunks_that_are_gone_through_a_different_number_of_times():
    chunks = Chunked(((0,) * 9, (0,) * 20), 1)  # rounds of 2 and 5 batches of 4 show 8 and 20 samples
    assert Plan(chunks, 4, steps_per_chunk=5).samples_per_pass == 2.5 * 8 + 20
    assert Plan(chunks, 4, passes_per_chunk=3).samples_per_pass == 3 * (8 + 20)


def test_slots_tell_passes_and_repeats_apart():
    plan = Plan(OneChunk(5), 5, passes_per_chunk=2)
    slots = [_shown(_pass(plan, number)) for number in range(3)]
    assert len({slot for some in slots for slot in some}) == 30
    assert min(slot for some in slots for slot in some) == 0  # draws take no negative seed
    assert all(sorted(slot % 5 for slot in some) == sorted(2 * list(range(5))) for some in slots)


@pytest.mark.parametrize("num_samples", [1, 3, 8])
def test_padding_where_samples_are_few(num_samples):
    plan = Plan(OneChunk(num_samples), 8, shuffle=False, leftovers="pad")
    (batch,) = _pass(plan, 0)
    assert batch.samples.tolist() == [place % num_samples for place in range(8)]
    assert batch.weights.tolist() == [1.0] * num_samples + [0.0] * (8 - num_samples)


def test_order_changes_with_seed_and_pass_but_not_without_shuffle():
    def order(seed, number, shuffle=True):
        return _pass(Plan(OneChunk(100), 100, seed, shuffle), number)[0].samples.tolist()

    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != list(range(100))
    assert order(0, 1, shuffle=False) == list(range(100))


def test_chunks_come_in_another_order_each_pass():
    orders = {tuple(chunk_order(0, number, 6)) for number in range(20)}
    assert len(orders) > 15
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert chunk_order(0, 3, 6, shuffle=False).tolist() == list(range(6))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 60), st.integers(0, 2**40))
def test_shards_are_distributed_evenly(counts, num_chunks, seed):
    counts = np.array(counts)
    if num_chunks > len(counts):
        with pytest.raises(UserError, match=rf"chunks\.count={num_chunks} exceeds .* shards, {len(counts)};"):
            split_shards(counts, num_chunks, seed)
        return
    chunks = split_shards(counts, num_chunks, seed)

    assert sorted(shard for chunk in chunks for shard in chunk) == list(range(len(counts)))
    assert len(chunks) == num_chunks
    assert all(len(chunk) and (np.diff(chunk) > 0).all() for chunk in chunks)
    assert max(counts[chunk].sum() for chunk in chunks) <= counts.sum() / num_chunks + 2 * counts.max()


def test_chunks_are_random_sets_of_shards():
    counts = np.full(100, 10)
    chunks = split_shards(counts, 10, 0)
    assert [len(chunk) for chunk in chunks] == [10] * 10
    assert all(np.ptp(chunk) > 20 for chunk in chunks)
    assert [c.tolist() for c in chunks] != [c.tolist() for c in split_shards(counts, 10, 1)]


def test_too_few_samples():
    with pytest.raises(
        UserError, match=r"7 samples do not fill one batch of 8 .*lower batch_size, use fewer processes"
    ):
        Plan(OneChunk(7), 8)
    with pytest.raises(UserError, match="1 sample does not fill one batch of 2"):
        Plan(OneChunk(1), 2)
    with pytest.raises(UserError, match="6 samples of chunk 0, one of 2, do not fill one batch of 8"):
        Plan(Chunked(((0,) * 6, (0,) * 6), 1), 8)
    with pytest.raises(UserError, match="no samples"):
        Plan(OneChunk(0), 8, leftovers="pad")


def test_resuming_with_another_size_before_any_batch_leaves_one_segment():
    cursor = Plan(OneChunk(20), 4).start()
    assert Plan(OneChunk(20), 5).resume(cursor).segments == (Segment(5, 0),)
