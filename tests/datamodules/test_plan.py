from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_lora.datamodules import Plan
from lit_lora.errors import UserError

plans = st.builds(
    lambda size, extra, seed, shuffle, leftovers: Plan(size + extra, size, seed, shuffle, leftovers),
    st.integers(1, 12),
    st.integers(0, 60),
    st.integers(0, 2**40),
    st.booleans(),
    st.sampled_from(["drop", "pad"]),
)


def _pass(plan, number):
    return [plan.batch(number, batch) for batch in range(plan.batches_per_pass)]


@given(plans, st.integers(0, 1000))
def test_a_pass_takes_each_sample_at_most_once(plan, number):
    batches = _pass(plan, number)
    counted = np.concatenate([batch.samples[batch.weights > 0] for batch in batches])

    assert len(set(counted.tolist())) == len(counted)
    assert set(counted.tolist()) <= set(range(plan.num_samples))
    left_out = plan.num_samples % plan.global_batch_size if plan.leftovers == "drop" else 0
    assert len(counted) == plan.num_samples - left_out


@given(plans, st.integers(0, 1000))
def test_all_batches_have_one_size_and_type(plan, number):
    for batch in _pass(plan, number):
        assert [column.shape for column in batch] == [(plan.global_batch_size,)] * 3
        assert [column.dtype for column in batch] == [np.int64, np.float32, np.int64]
        assert (batch.samples >= 0).all()
        assert (batch.samples < plan.num_samples).all()


@given(plans)
def test_slots_count_all_places_of_the_run(plan):
    slots = np.concatenate([batch.slots for number in range(3) for batch in _pass(plan, number)])
    assert slots.tolist() == list(range(3 * plan.batches_per_pass * plan.global_batch_size))


@given(plans, st.integers(0, 1000), st.integers(0, 1000))
def test_a_batch_depends_on_its_numbers_only(plan, one, other):
    again = Plan(plan.num_samples, plan.global_batch_size, plan.seed, plan.shuffle, plan.leftovers)
    batches = _pass(plan, one)
    for number in reversed(range(plan.batches_per_pass)):
        again.batch(other, number)
        assert [c.tolist() for c in again.batch(one, number)] == [c.tolist() for c in batches[number]]


@pytest.mark.parametrize("num_samples", [1, 3, 8])
def test_padding_where_samples_are_few(num_samples):
    plan = Plan(num_samples, 8, shuffle=False, leftovers="pad")
    assert plan.batches_per_pass == 1
    batch = plan.batch(0, 0)
    assert batch.samples.tolist() == [place % num_samples for place in range(8)]
    assert batch.weights.tolist() == [1.0] * num_samples + [0.0] * (8 - num_samples)


def test_order_changes_with_seed_and_pass_but_not_without_shuffle():
    def order(seed, number, shuffle=True):
        return Plan(100, 100, seed, shuffle).batch(number, 0).samples.tolist()

    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != list(range(100))
    assert order(0, 1, shuffle=False) == list(range(100))


def test_too_few_samples():
    with pytest.raises(
        UserError, match=r"7 samples do not fill one batch of 8 .*lower batch_size, use fewer processes"
    ):
        Plan(7, 8)
    with pytest.raises(UserError, match="no samples"):
        Plan(0, 8, leftovers="pad")
