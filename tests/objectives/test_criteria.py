"""Criteria against their formulas, written out anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_lora.errors import UserError
from lit_lora.objectives import (
    Criterion,
    ExponentialPseudoHuber,
    NoiseLevel,
    PseudoHuber,
    SNRPseudoHuber,
    SquaredError,
)

SIGMA = torch.tensor([1.0, 0.9, 0.3, 0.01])  # of flow matching; 1 is pure noise
LEVEL = NoiseLevel(SIGMA, ((1 - SIGMA) / SIGMA) ** 2)
DIFFERENCE = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_squared_error() -> None:
    assert torch.equal(SquaredError().errors(DIFFERENCE, LEVEL), DIFFERENCE * DIFFERENCE)


@pytest.mark.parametrize(
    ("criterion", "thresholds"),
    [
        (PseudoHuber(0.2), [0.2] * 4),
        (ExponentialPseudoHuber(0.2), [0.2**1.0, 0.2**0.9, 0.2**0.3, 0.2**0.01]),
        (SNRPseudoHuber(0.2), [0.2, 0.8 * 0.1**2 + 0.2, 0.8 * 0.7**2 + 0.2, 0.8 * 0.99**2 + 0.2]),
    ],
)
def test_pseudo_huber(criterion: Criterion, thresholds: list[float]) -> None:
    errors = criterion.errors(DIFFERENCE, LEVEL)
    for error, difference, c in zip(errors, DIFFERENCE, thresholds, strict=True):
        torch.testing.assert_close(error, 2 * c * ((difference**2 + c**2) ** 0.5 - c))


def test_small_errors_are_squared_and_large_ones_linear() -> None:
    differences = torch.tensor([1e-2, 1e4]).view(2, 1)
    small, large = PseudoHuber(1.0).errors(differences, NoiseLevel(torch.ones(2), torch.ones(2))).flatten().tolist()
    assert small == pytest.approx(1e-4, rel=1e-2)
    assert large == pytest.approx(2e4, rel=1e-3)


@pytest.mark.parametrize("kind", [PseudoHuber, ExponentialPseudoHuber, SNRPseudoHuber])
def test_values_out_of_range(kind: Any) -> None:
    with pytest.raises(UserError, match=r"c=0.0 is too small; it must be above 0"):
        kind(0.0)
    if kind is not PseudoHuber:
        with pytest.raises(UserError, match=r"c=1.5 is too large; it must be at most 1"):
            kind(1.5)
