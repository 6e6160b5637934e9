from __future__ import annotations

import pytest
import torch

from lit_lora.finite import any_non_finite, non_finite_names

INF, NAN = float("inf"), float("nan")
FP8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, *FP8])
def test_non_finite_values_of_each_dtype(dtype: torch.dtype) -> None:
    largest = torch.tensor([-1.0, min(torch.finfo(dtype).max, 1e38)]).to(dtype)
    bad = torch.tensor([1.0, NAN]).to(dtype)
    assert not any_non_finite([largest, torch.zeros(0, dtype=dtype)])
    assert any_non_finite([largest, bad])
    assert non_finite_names({"largest": largest, "bad": bad, "count": torch.tensor([3])}) == ["bad"]


def test_infinity_in_e5m2() -> None:
    assert non_finite_names({"a": torch.tensor([-INF]).to(torch.float8_e5m2)}) == ["a"]
