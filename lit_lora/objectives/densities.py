"""From where flow matching draws its times: densities on [0, 1], 0 for data and 1 for noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError


class TimestepDensity(ABC):
    """A density of training times; all but :class:`Uniform` are from Esser et al. 2024 (arXiv 2403.03206, section 3.1)."""

    @abstractmethod
    def times(self, draws: Draws) -> Tensor:
        """Times in [0, 1], float32 ``(B,)``, one for each sample of the draws."""


@dataclass(frozen=True)
class Uniform(TimestepDensity):
    """All times alike."""

    def times(self, draws: Draws) -> Tensor:
        return draws.uniform("timestep")


@dataclass(frozen=True)
class LogitNormal(TimestepDensity):
    """The sigmoid of a normal value: ``t = sigmoid(mean + std * n)``, the density that the paper prefers.

    diffusers' training scripts count time from the noise, so that their ``logit_mean`` has the opposite sign.

    Args:
        mean: Of the normal value; above 0 there is more noise. 0 by default.
        std: Of the normal value, above 0; 1 by default.

    Raises:
        UserError: If ``std`` is not above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise UserError(f"LogitNormal: std={self.std} must be above 0; use Uniform for a flat density")

    def times(self, draws: Draws) -> Tensor:
        return torch.sigmoid(self.mean + self.std * draws.normal("timestep", ()))


@dataclass(frozen=True)
class Mode(TimestepDensity):
    """A density with a heavy tail: ``t = 1 - u - scale * (cos(pi u / 2)**2 - 1 + u)`` for uniform ``u``.

    Args:
        scale: In [-1, 2 / (pi - 2)], where the map is monotonic; above 0 the middle of the times is drawn more often. 1.29
            by default, as in the paper.

    Raises:
        UserError: If ``scale`` is outside its range.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(f"Mode: scale={self.scale} must lie in [-1, {2 / (math.pi - 2):.4f}]")

    def times(self, draws: Draws) -> Tensor:
        u = draws.uniform("timestep")
        times: Tensor = 1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return times.clamp(0, 1)


@dataclass(frozen=True)
class CosMap(TimestepDensity):
    """The times of a cosine schedule: ``t = 1 - 1 / (tan(pi u / 2) + 1)`` for uniform ``u``."""

    def times(self, draws: Draws) -> Tensor:
        u = draws.uniform("timestep")
        return 1 - 1 / (torch.tan(math.pi * u / 2) + 1)
