"""Adapters of tiny models of each family, with values that are not zero."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig

from lit_lora.adapters import adapter_state, plain_config
from lit_lora.families import Flux, ModelFamily, StableDiffusion, StableDiffusion3, StableDiffusionXL
from lit_lora.formats import AdapterFiles

FAMILIES: dict[str, type[ModelFamily]] = {
    "sd_folder": StableDiffusion,
    "sdxl_folder": StableDiffusionXL,
    "sd3_folder": StableDiffusion3,
    "flux_folder": Flux,
}
"""Families by the fixtures with their tiny models."""

ALL_LAYERS = (
    r"(.*\.)?(to_(q|k|v|out\.0|add_out)|add_._proj|proj_(in|out|mlp)|net\.0\.proj|net\.2|linear|conv\d?|conv_(in|out|shortcut)"
    r"|linear_\d|(x|context)_embedder)"
)
"""Linear layers and convolutions of every kind."""


def loaded(family: type[ModelFamily], folder: Path) -> ModelFamily:
    """The tiny model's denoiser in float32."""
    model = family(str(folder))
    model.load(torch.float32, without=("vae", "text"))
    return model


def trained(model: ModelFamily, config: PeftConfig) -> AdapterFiles:
    """An adapter in the model, as if it had been trained."""
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.denoiser.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            elif parameter.requires_grad:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
    base = {"base_model_name_or_path": model.pretrained_model_name_or_path}
    return AdapterFiles(
        adapter_state(model.denoiser),
        plain_config(config) | base,
        family=type(model),
        denoiser_config=model.naming_config,
    )


def encoder_adapter(width: int = 16, layer: str = "encoder.layers.1.self_attn.out_proj") -> AdapterFiles:
    """A LoRA of one layer of a text encoder."""
    config = LoraConfig(r=2, lora_alpha=1, target_modules=[layer])
    generator = torch.Generator().manual_seed(6)
    state = {
        f"base_model.model.text_model.{layer}.lora_A.weight": torch.randn(2, width, generator=generator),
        f"base_model.model.text_model.{layer}.lora_B.weight": torch.randn(width, 2, generator=generator),
    }
    return AdapterFiles(state, plain_config(config))
