"""Adapters of a small UNet with random values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from lit_lora.adapters import plain_config
from lit_lora.families import StableDiffusion
from lit_lora.formats import AdapterFiles


def unet_adapter(
    unet: nn.Module,
    names: Sequence[str],
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    base: str = "a base",
    **options: Any,
) -> AdapterFiles:
    """A LoRA of some layers of a UNet, with singular values that fall."""
    settings = LoraConfig(
        **{"r": 4, "lora_alpha": 2, "target_modules": list(names), "rank_pattern": dict(ranks or {}), **options}
    )
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in names:
        layer: Any = unet.get_submodule(name)
        rank = next((value for end, value in (ranks or {}).items() if name.endswith(end)), settings.r)
        down = torch.randn(rank, *layer.weight.shape[1:], generator=generator) / 3
        down *= 0.5 ** torch.arange(rank).view(-1, *[1] * (down.ndim - 1))
        up = torch.randn(len(layer.weight), rank, *[1] * (down.ndim - 2), generator=generator)
        state |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    return AdapterFiles(state, plain_config(settings) | {"base_model_name_or_path": base}, family=StableDiffusion)
