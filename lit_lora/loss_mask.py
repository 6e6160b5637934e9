"""Masks of the loss at the size of the latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def mask_of_latents(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Share of each latent pixel that a mask keeps, float32 in [0, 1], ``(B, 1, h, w)``.

    Args:
        mask: Mask in pixels, uint8 in [0, 255], ``(B, 1, H, W)``; or the result of this function for the same size, from a cache.
        size: Height and width of the latents.
    """
    shares = F.interpolate(mask.float(), tuple(size), mode="area")
    return shares if mask.is_floating_point() else shares / 255
