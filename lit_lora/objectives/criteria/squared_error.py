"""The squared error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.objectives.criteria.base import Criterion
from lit_lora.objectives.noise_level import NoiseLevel


@dataclass(frozen=True)
class SquaredError(Criterion):
    """The squared error, with which the published models were trained."""

    def errors(self, difference: Tensor, level: NoiseLevel) -> Tensor:
        return difference.square()
