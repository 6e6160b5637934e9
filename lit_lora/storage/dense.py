"""Weights as they are, in the base's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_lora.storage.base import BaseStorage, Stored


class Dense(BaseStorage):
    """Stores nothing in another way than ``base_dtype``: two bytes a weight in bfloat16."""

    def __init__(self) -> None:
        super().__init__()

    def store(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def restore(self, stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return stored["weight"].to(dtype)

    def takes(self, name: str, always_skipped: object = ()) -> bool:
        return False
