"""Weighting of flow matching by the density of a cosine schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lit_lora.objectives.noise_level import NoiseLevel
from lit_lora.objectives.weightings.base import Weighting


@dataclass(frozen=True)
class CosMapWeighting(Weighting):
    r"""The weight :math:`2 / (\pi (1 - 2 \sigma + 2 \sigma^2))` (Esser et al., 2024, arXiv 2403.03206), for flow matching.

    It is the density of the times of a cosine schedule, so that uniform times count as if they were drawn with ``CosMap``.
    """

    @property
    def predictions(self) -> tuple[str, ...]:
        return ("flow_prediction",)

    def weights(self, level: NoiseLevel, prediction_type: str) -> Tensor:
        sigma = level.time
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
