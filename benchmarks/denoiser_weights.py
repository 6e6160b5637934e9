"""Shapes of the weights of denoisers with an adapter, in the groups that FSDP2 gathers together; no weights are read."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from communication_model import Weight
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from real_models import write_pipeline
from torch import nn

import lit_lora.quantization
from lit_lora import StableDiffusion, StableDiffusionXL
from lit_lora.adapters import inject
from lit_lora.blocks import outermost_blocks
from lit_lora.embedded import resolve
from lit_lora.planning.fake_module import fake_tensors
from lit_lora.quantization.load import _parts, shape_model


def embedded(quantization: str) -> list[list[Weight]]:
    """The embedded base's denoiser with LoRA of rank 8."""
    return _of_family(StableDiffusion("embedded"), quantization, 8)


def sdxl(quantization: str) -> list[list[Weight]]:
    """Stable Diffusion XL's denoiser with LoRA of rank 16."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_pipeline("sdxl", Path(folder) / "sdxl", weights=False)
        return _of_family(StableDiffusionXL(str(path)), quantization, 16)


def flux(quantization: str) -> list[list[Weight]]:
    """The transformer of FLUX.1-dev with LoRA of rank 16; every layer is quantized."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            plain = FluxTransformer2DModel(guidance_embeds=True)
        plain.save_config(Path(folder) / "transformer")
        with fake_tensors():
            scheme = getattr(lit_lora.quantization, quantization)()
            model = shape_model(FluxTransformer2DModel, folder, "transformer", scheme, torch.bfloat16)
            adapted = inject(model, LoraConfig(r=16, lora_alpha=16), ("to_q", "to_k", "to_v", "to_out.0"))
            return _groups(adapted, plain, ("FluxTransformerBlock", "FluxSingleTransformerBlock"))


def _of_family(family: Any, quantization: str, rank: int) -> list[list[Weight]]:
    folder = resolve(family.pretrained_model_name_or_path)
    with torch.device("meta"):
        kind = family.denoiser_class
        plain = kind.from_config(kind.load_config(folder, subfolder=family.denoiser_name))
    with fake_tensors():
        scheme = getattr(lit_lora.quantization, quantization)()
        family.load(torch.bfloat16, without=("vae", "text"), quantization=scheme, weights=False)
        family.add_adapter(LoraConfig(r=rank, lora_alpha=rank))
        return _groups(family.denoiser, plain, family.block_classes)


def _groups(denoiser: Any, plain: nn.Module, block_classes: Sequence[str]) -> list[list[Weight]]:
    """Group the weights as ``load_adapted`` shards them.

    Args:
        denoiser: Denoiser with the adapter.
        plain: The same model before quantization and without the adapter.
        block_classes: Class names of the family's blocks.
    """
    names = {module: name for name, module in plain.named_modules()}
    model = denoiser.get_base_model()
    parts = [model.get_submodule(names[part]) for part in _parts(plain, set(outermost_blocks(plain, block_classes)))]
    seen: set[int] = set()
    groups = []
    for module in [*(part for part in parts[:-1] if not isinstance(part, BaseTunerLayer)), denoiser]:
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        if own:
            groups.append([Weight(tuple(p.shape), p.element_size(), p.requires_grad) for p in own])
    return groups
