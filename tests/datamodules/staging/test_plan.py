from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_lora.datamodules.batches.plan import chunk_order
from lit_lora.datamodules.staging.plan import StagingPlan


@st.composite
def _plans(draw):
    """Plans whose budget holds any two chunks."""
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=12))
    num_chunks = draw(st.integers(1, len(sizes)))
    chunks = [list(range(start, len(sizes), num_chunks)) for start in range(num_chunks)]
    needed = sum(sorted(sum(sizes[shard] for shard in chunk) for chunk in chunks)[-2:])
    budget = needed + draw(st.integers(0, 100))
    return StagingPlan(sizes, chunks, budget, draw(st.integers(0, 5)), draw(st.booleans()))


@pytest.mark.parametrize("shuffle", [True, False])
def test_visits_go_through_the_chunks_in_the_order_of_their_pass(shuffle):
    plan = StagingPlan([1] * 5, [[shard] for shard in range(5)], 10, seed=3, shuffle=shuffle)
    expected = np.concatenate([chunk_order(3, number, 5, shuffle) for number in range(4)]).tolist()

    assert [plan.chunk(visit) for visit in range(20)] == expected
    assert [plan.chunk(visit) for visit in (19, 0, 7)] == [expected[visit] for visit in (19, 0, 7)]


@given(_plans(), st.integers(0, 30))
def test_visits_fit_the_budget_and_one_more_would_not(plan, first):
    visits = plan.visits(first)
    sizes = [
        sum(plan.sizes[shard] for shard in plan.shards(range(first, end))) for end in (visits.stop, visits.stop + 1)
    ]

    assert visits.start == first
    assert len(visits) >= 2  # the chunk after the present one always fits
    assert sizes[0] <= plan.budget
    assert sizes[1] > plan.budget or len(visits) == len(plan.chunks) + 1


@given(_plans(), st.integers(0, 30))
def test_kept_shards_remain_until_their_visit_has_passed(plan, first):
    assert plan.visits(first + 1).stop >= plan.visits(first).stop


@given(_plans(), st.integers(0, 30))
def test_next_use(plan, first):
    uses = plan.next_use(first)
    for chunk, shards in enumerate(plan.chunks):
        following = next(visit for visit in range(first, first + 100) if plan.chunk(visit) == chunk)
        assert [uses[shard] for shard in shards] == [following] * len(shards)


def test_shard_of_no_chunk_is_never_used():
    plan = StagingPlan([1, 1, 1], [[0], [2]], 5, seed=0, shuffle=False)
    assert plan.next_use(3) == [4, math.inf, 3]


def test_shards_come_in_the_order_of_need():
    plan = StagingPlan([1] * 4, [[3, 1], [0, 1], [2]], 5, seed=0, shuffle=False)
    assert plan.shards(range(1, 4)) == [0, 1, 2, 3]
