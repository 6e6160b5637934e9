"""One number of eight bits for each weight, and one scale for each output channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lit_lora.quantization.base import Quantization, Stored


class Scaled(Quantization):
    """Weights of an output channel divided by their largest magnitude, in a dtype of eight bits."""

    dtype: torch.dtype
    largest: float
    """The largest number that is used of :attr:`dtype`."""
    rounds: ClassVar[bool]
    """Whether a conversion to :attr:`dtype` has to be told to round."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        rows = weight.float().flatten(1)
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / self.largest
        data = rows / scale
        if self.rounds:
            data.round_()
        # As integers, whatever they mean: processes can exchange these, and nobody takes them for trainable numbers.
        return {"weight_data": data.to(self.dtype).view(torch.int8).view(weight.shape), "weight_scale": scale}

    def dequantize(self, stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        data = stored["weight_data"].view(self.dtype)
        scale = stored["weight_scale"].view(-1, *[1] * (len(shape) - 1))
        if dtype == torch.float16:  # in which a scale may be too small to be a normal number
            return data.float().mul_(scale).to(dtype)
        return data.to(dtype).mul_(scale.to(dtype))
