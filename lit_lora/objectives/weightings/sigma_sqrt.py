"""Weighting of flow matching by the inverse square of sigma."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.objectives.noise_level import NoiseLevel
from lit_lora.objectives.weightings.base import Weighting


@dataclass(frozen=True)
class SigmaSqrt(Weighting):
    r"""The weight :math:`\sigma^{-2}`, ``sigma_sqrt`` in diffusers' training scripts, for flow matching."""

    @property
    def predictions(self) -> tuple[str, ...]:
        return ("flow_prediction",)

    def weights(self, level: NoiseLevel, prediction_type: str) -> Tensor:
        return level.time**-2
