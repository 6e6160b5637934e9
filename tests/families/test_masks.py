"""Numbers of tokens by their masks."""

from __future__ import annotations

import pytest
import torch

from lit_lora.families.masks import token_counts
from lit_lora.planning.fake_module import fake_tensors


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_tokens_up_to_the_last_in_the_mask(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).to(dtype)
    assert token_counts(mask) == [2, 4, 3, 1]


def test_a_plan_takes_all_tokens() -> None:
    with fake_tensors():
        assert token_counts(torch.zeros(2, 5)) == [5, 5]
