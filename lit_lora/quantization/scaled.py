"""8-bit weights with one scale per output channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lit_lora.quantization.base import Quantization, Stored


class Scaled(Quantization):
    """Base of the 8-bit quantizations: each output channel is scaled to the range of :attr:`dtype`."""

    dtype: torch.dtype
    largest: float
    """Largest number of :attr:`dtype` that is used."""
    rounds: ClassVar[bool]
    """Whether to round before the conversion to :attr:`dtype`, which would truncate."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        rows = weight.float().flatten(1)
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / self.largest
        data = rows / scale
        if self.rounds:
            data.round_()
        # Stored as int8 in every format, which processes can exchange and which nothing treats as trainable.
        return {"weight_data": data.to(self.dtype).view(torch.int8).view(weight.shape), "weight_scale": scale}

    def dequantize(self, stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        data = stored["weight_data"].view(self.dtype)
        scale = stored["weight_scale"].view(-1, *[1] * (len(shape) - 1))
        if dtype == torch.float16:  # a scale may underflow in float16
            return data.float().mul_(scale).to(dtype)
        return data.to(dtype).mul_(scale.to(dtype))
