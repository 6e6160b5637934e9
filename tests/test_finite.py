from __future__ import annotations

import pytest
import torch

from lit_lora.finite import any_non_finite, any_non_finite_gradient, non_finite_names

INF, NAN = float("inf"), float("nan")
FP8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, *FP8])
def test_non_finite_values_of_each_dtype(dtype: torch.dtype) -> None:
    largest = torch.tensor([-1.0, min(torch.finfo(dtype).max, 1e38)]).to(dtype)
    bad = torch.tensor([1.0, NAN]).to(dtype)
    assert not any_non_finite([largest, torch.zeros(0, dtype=dtype)])
    assert any_non_finite([largest, bad])
    assert not any_non_finite_gradient([largest, torch.zeros(0, dtype=dtype)])
    assert any_non_finite_gradient([largest, bad])
    assert non_finite_names({"largest": largest, "bad": bad, "count": torch.tensor([3])}) == ["bad"]


def test_infinity_in_e5m2() -> None:
    assert non_finite_names({"a": torch.tensor([-INF]).to(torch.float8_e5m2)}) == ["a"]


def test_gradients_of_several_kinds_keep_their_values() -> None:
    sparse = torch.sparse_coo_tensor([[1]], torch.tensor([2.0]), (3,), check_invariants=True)
    gradients = [
        torch.tensor([1e-45, -0.0, 3e38]),
        torch.ones(2, 4, dtype=torch.bfloat16)[:, ::2],
        torch.zeros(0),
        sparse,
    ]
    before = [gradient.clone() for gradient in gradients]
    assert not any_non_finite_gradient(gradients)
    assert not any_non_finite_gradient([])
    for one, other in zip(gradients[:3], before, strict=False):
        assert torch.equal(one, other)
        assert torch.equal(one.signbit(), other.signbit())
    for number, value in ((0, INF), (1, NAN), (3, -INF)):
        bad = [*gradients]
        bad[number] = gradients[number].clone() * value
        assert any_non_finite_gradient(bad)
