"""Multi-resolution noise."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.draws import Draws, seed_of
from lit_lora.errors import UserError, check_whole
from lit_lora.objectives.noises.base import NoiseKind


@dataclass(frozen=True)
class PyramidNoise(NoiseKind):
    r"""Multi-resolution noise (Whitaker, 2023, "Multi-resolution noise for diffusion model training"), for brightness and layout.

    Noise of ever lower resolutions is enlarged bilinearly and added to the noise:
    :math:`\epsilon + up(z_0) + d up(z_1) + d^2 up(z_2) + ...`, where level :math:`i` has the height :math:`h / r^i` and the
    width :math:`w / r^i`, rounded down, for a ratio :math:`r` that each level draws from [2, 4). The levels end with the first
    whose height or width is 1, and the sum is divided by its standard deviation.

    Each sample has ratios of its own, so that its noise does not depend on the batch.

    Args:
        discount: Factor :math:`d`, in (0, 1]: higher values give more of the low resolutions. Defaults to 0.3.
        levels: Largest number of levels; defaults to 6.

    Raises:
        UserError: If ``discount`` is outside (0, 1], or ``levels`` is below 1.
    """

    discount: float = 0.3
    levels: int = 6

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not 0 < self.discount <= 1:
            raise UserError(f"PyramidNoise: discount={self.discount} is out of range; it must lie in (0, 1]")
        check_whole(1, levels=self.levels)

    def apply(self, noise: Tensor, draws: Draws) -> Tensor:
        each = [
            self._of_one(row[None], Draws(draws.seed, [slot], draws.device))
            for row, slot in zip(noise, draws.slots, strict=True)
        ]
        return torch.cat(each)

    def _of_one(self, noise: Tensor, draws: Draws) -> Tensor:
        """The changed noise of one sample, float32 ``(1, C, h, w)``."""
        channels, height, width = noise.shape[1:]
        # Sizes are Python numbers: reading them from a tensor would wait for the device.
        ratios = random.Random(seed_of(draws.seed, "pyramid ratio", draws.slots[0]))
        total = noise
        for level in range(self.levels):
            shrink = ratios.uniform(2, 4) ** level
            size = max(1, int(height / shrink)), max(1, int(width / shrink))
            coarse = draws.normal(f"pyramid {level}", (channels, *size))
            total = total + self.discount**level * F.interpolate(coarse, (height, width), mode="bilinear")
            if 1 in size:
                break
        return total / total.std()
