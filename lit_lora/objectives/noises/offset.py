"""Offset noise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.draws import Draws
from lit_lora.errors import check_above
from lit_lora.objectives.noises.base import NoiseKind


@dataclass(frozen=True)
class OffsetNoise(NoiseKind):
    r"""Offset noise (Guttenberg, 2023, crosslabs.org, "Diffusion with offset noise"), for darker and brighter images.

    A normal value that all pixels of a channel share is added to the noise: :math:`\epsilon + s z` with :math:`z` of the shape
    :math:`(B, C, 1, 1)`.

    Args:
        scale: Factor :math:`s`, above 0; defaults to 0.1.

    Raises:
        UserError: If ``scale`` is not above 0.
    """

    scale: float = 0.1

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_above(0, scale=self.scale)

    def apply(self, noise: Tensor, draws: Draws) -> Tensor:
        return noise + self.scale * draws.normal("noise offset", (noise.shape[1], *[1] * (noise.ndim - 2)))
