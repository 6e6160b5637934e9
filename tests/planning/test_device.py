from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lit_lora.planning import device


@pytest.mark.parametrize(
    ("flops", "sizes"), [(1e9, [192]), (30e9, [192, 384, 768]), (8e10, [192, 384, 768]), (1e15, [192, 384, 768, 1536])]
)
def test_matrices_that_are_measured_are_as_large_as_the_rate_needs(
    flops: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied: list[int] = []

    def shortest(multiply: Callable[[], torch.Tensor]) -> float:
        multiplied.append(len(multiply()))
        return 2 * multiplied[-1] ** 3 / flops

    monkeypatch.setattr(device, "_shortest", shortest)
    assert device._flops(torch.float32) == pytest.approx(flops)
    assert multiplied == sizes
