"""No quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_lora.quantization.base import Quantization, Stored


class Dense(Quantization):
    """No quantization: all weights stay in ``base_dtype``, two bytes each in bfloat16."""

    def __init__(self) -> None:
        super().__init__()

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def dequantize(self, stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return stored["weight"].to(dtype)

    def takes(self, name: str, always_skipped: object = ()) -> bool:
        return False
