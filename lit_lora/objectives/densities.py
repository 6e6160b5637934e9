"""Densities of the times in flow matching, on [0, 1] with 0 for data and 1 for noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.draws import Draws
from lit_lora.errors import UserError, check_above


class TimestepDensity(ABC):
    """A density of training times; all except :class:`Uniform` are from Esser et al., 2024 (arXiv 2403.03206, section 3.1)."""

    @abstractmethod
    def times(self, draws: Draws) -> Tensor:
        """Draw one time in [0, 1] for each sample of the batch, float32 ``(B,)``.

        Args:
            draws: Random numbers of the batch.
        """


@dataclass(frozen=True)
class Uniform(TimestepDensity):
    """The uniform density on [0, 1)."""

    def times(self, draws: Draws) -> Tensor:
        return draws.uniform("timestep")


@dataclass(frozen=True)
class LogitNormal(TimestepDensity):
    """The logit-normal density, which Esser et al., 2024, prefer: ``t = sigmoid(mean + std * n)`` for standard normal ``n``.

    diffusers' training scripts measure time from the noise, so their ``logit_mean`` has the opposite sign.

    Args:
        mean: Mean of the normal value; values above 0 give more noise. Defaults to 0.
        std: Standard deviation of the normal value, above 0; defaults to 1.

    Raises:
        UserError: If ``std`` is not above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_above(0, std=self.std)

    def times(self, draws: Draws) -> Tensor:
        return torch.sigmoid(self.mean + self.std * draws.normal("timestep", ()))


@dataclass(frozen=True)
class Mode(TimestepDensity):
    """A density with a heavy tail: ``t = 1 - u - scale * (cos(pi u / 2)**2 - 1 + u)`` for uniform ``u``.

    Args:
        scale: Scale in [-1, 2 / (pi - 2)], where the map is monotonic; values above 0 favor times in the middle. Defaults to
            1.29, as in the paper.

    Raises:
        UserError: If ``scale`` is outside its range.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(f"Mode: scale={self.scale} is out of range; it must lie in [-1, {2 / (math.pi - 2):.4f}]")

    def times(self, draws: Draws) -> Tensor:
        u = draws.uniform("timestep")
        times: Tensor = 1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return times.clamp(0, 1)


@dataclass(frozen=True)
class CosMap(TimestepDensity):
    """The density of a cosine schedule: ``t = 1 - 1 / (tan(pi u / 2) + 1)`` for uniform ``u``."""

    def times(self, draws: Draws) -> Tensor:
        u = draws.uniform("timestep")
        return 1 - 1 / (torch.tan(math.pi * u / 2) + 1)
