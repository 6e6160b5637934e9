from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_lora.adapters.rank_selection import select_components
from lit_lora.errors import UserError

layers = st.lists(
    st.tuples(
        st.lists(st.floats(0, 100, width=32), min_size=1, max_size=6),
        st.integers(1, 50),
    ),
    min_size=1,
    max_size=6,
)


def test_the_most_important_stay_wherever_they_are() -> None:
    kept = select_components([torch.tensor([1.0, 9.0, 8.0]), torch.tensor([2.0, 7.0, 3.0])], [1.0, 1.0], 4)
    assert [indices.tolist() for indices in kept] == [[1, 2], [1, 2]]
    kept = select_components([torch.tensor([10.0, 9.0, 8.0]), torch.tensor([2.0, 7.0, 3.0])], [1.0, 1.0], 4)
    assert [indices.tolist() for indices in kept] == [[0, 1, 2], [1]]


def test_importance_counts_for_each_parameter_that_a_component_costs() -> None:
    scores = [torch.tensor([9.0, 6.0]), torch.tensor([5.0, 4.0])]
    assert [len(indices) for indices in select_components(scores, [3.0, 1.0], 5.0)] == [1, 2]
    assert [len(indices) for indices in select_components(scores, [1.0, 1.0], 3.0)] == [2, 1]


@given(layers, st.floats(0, 1), st.integers(1, 3))
def test_the_budget_holds_and_the_best_of_each_layer_stay(
    parts: list[tuple[list[float], int]], share: float, min_rank: int
) -> None:
    scores = [torch.tensor(values) for values, _ in parts]
    costs = [float(cost) for _, cost in parts]
    least = sum(cost * min(min_rank, len(values)) for values, cost in zip(scores, costs, strict=True))
    most = sum(cost * len(values) for values, cost in zip(scores, costs, strict=True))
    budget = least + share * (most - least)
    kept = select_components(scores, costs, budget, min_rank)
    spent = sum(cost * len(indices) for indices, cost in zip(kept, costs, strict=True))
    assert spent <= budget + 1e-6
    for values, indices in zip(scores, kept, strict=True):
        assert len(indices) >= min(min_rank, len(values))
        assert indices.tolist() == sorted(set(indices.tolist()))
        left_out = [float(value) for i, value in enumerate(values) if i not in set(indices.tolist())]
        assert not left_out or max(left_out) <= float(values[indices].min())
    if share == 1:
        assert spent == most


def test_a_budget_below_the_least_rank_of_each_layer_is_an_error() -> None:
    with pytest.raises(UserError, match=r"budget of 3 is below 4, the cost of min_rank=2 in each of the 2 layers"):
        select_components([torch.ones(4), torch.ones(4)], [1.0, 1.0], 3, min_rank=2)
