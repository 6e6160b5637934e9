"""What several test files share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.data import DataLoader

from lit_lora.storage import Dense
from lit_lora.storage.frozen_layer import can_freeze, freeze_layer


def tiny_unet() -> UNet2DConditionModel:
    """A UNet of Stable Diffusion's kind with random weights, for latents of 8 x 8."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def make_batches(count: int, batch_size: int = 2, size: int = 16, seed: int = 3) -> list[dict[str, Any]]:
    """Random pictures as a datamodule gives them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 3, size, size)
    return [
        {
            "pixel_values": torch.randint(256, shape, generator=generator, dtype=torch.uint8),
            "caption": [f"a red {name} on white" for name in ("seven", "star", "heart", "two")[:batch_size]],
            "original_size": torch.tensor([[20 + number, 24]] * batch_size),
            "crop_top_left": torch.tensor([[1, number]] * batch_size),
            "weight": torch.ones(batch_size),
            "slot": list(range(number * batch_size, (number + 1) * batch_size)),
            "key": [f"{number}-{i}" for i in range(batch_size)],
        }
        for number in range(count)
    ]


def loader_of(batches: list[dict[str, Any]]) -> DataLoader[Any]:
    """A dataloader that gives ready-made batches in order."""
    return DataLoader(batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def freeze_remaining(model: nn.Module) -> None:
    """Make every Linear and Conv2d layer that is none yet a frozen layer with its weight as it is."""
    for layer in model.modules():
        if can_freeze(layer):
            weight = layer.weight
            assert isinstance(weight, torch.Tensor)
            freeze_layer(layer, Dense(), weight.detach(), weight.dtype)
