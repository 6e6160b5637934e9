"""Tokens of 2 x 2 patches, and their positions, as FLUX.1 and its relatives take them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Pack latents, ``(B, C, h, w)``, to tokens of 2 x 2 patches, ``(B, h/2 * w/2, 4 C)``."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Invert :func:`pack`; returns ``(B, C, height, width)``."""
    patches = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions of the tokens, each (0, row, column): float32 ``(rows * columns, 3)``."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
