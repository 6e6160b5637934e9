"""Weightings against their formulas, written out anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.objectives import P2, DebiasedEstimation, MinSNR, NoiseLevel, SoftMinSNR, Weighting

SNR = torch.tensor([1e-4, 0.03, 1.0, 4.9, 5.1, 1200.0])
LEVEL = NoiseLevel(torch.linspace(1, 0, 6), SNR)

# The weight of epsilon's error, as in the paper of each.
OF_EPSILON: dict[str, tuple[Weighting, Tensor]] = {
    "min-SNR": (MinSNR(), torch.minimum(SNR, torch.tensor(5.0)) / SNR),
    "soft min-SNR": (SoftMinSNR(), 1 / (1 / SNR + 1 / 4) / SNR),
    "debiased": (DebiasedEstimation(), 1 / torch.sqrt(SNR)),
    "P2": (P2(0.5, 2.0), 1 / (2 + SNR) ** 0.5),
}


@pytest.mark.parametrize("name", OF_EPSILON)
def test_formula(name: str) -> None:
    weighting, expected = OF_EPSILON[name]
    torch.testing.assert_close(weighting.weights(LEVEL, "epsilon"), expected)


@pytest.mark.parametrize("name", OF_EPSILON)
def test_the_same_error_counts_the_same_whatever_is_predicted(name: str) -> None:
    """A wrong x0 at the same noisy latents, and the errors of epsilon and of the velocity that follow from it."""
    weighting, _ = OF_EPSILON[name]
    a, s = (SNR / (1 + SNR)).sqrt(), (1 / (1 + SNR)).sqrt()  # noisy = a x0 + s epsilon
    wrong = torch.full_like(SNR, 0.3)
    error = {"sample": wrong, "epsilon": a * wrong / s, "v_prediction": a * (a * wrong / s) + s * wrong}
    counted = [weighting.weights(LEVEL, name) * difference**2 for name, difference in error.items()]
    torch.testing.assert_close(counted[1], counted[0])
    torch.testing.assert_close(counted[2], counted[0])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MinSNR, {"gamma": 0.0}, "gamma=0.0 is too small; it must be above 0"),
        (SoftMinSNR, {"gamma": -1.0}, "gamma=-1.0 is too small; it must be above 0"),
        (P2, {"gamma": -1.0}, "gamma=-1.0 is too small; it must be at least 0"),
        (P2, {"k": 0.0}, "k=0.0 is too small; it must be above 0"),
    ],
)
def test_values_out_of_range(kind: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(**options)
