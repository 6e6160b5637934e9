"""Pipelines of real architecture and size with random weights, as folders: memory and time do not depend on the values.

The configs are those published with Stable Diffusion 1.5 and Stable Diffusion XL 1.0; ``python benchmarks/real_models.py sd15
FOLDER`` writes one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lit_lora.embedded import base_path
from lit_lora.files import atomic_folder

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_CLIP_G = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "hidden_act": "gelu",
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

_SD15: dict[str, Callable[[], Any]] = {
    "unet": lambda: UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    ),
    "vae": lambda: AutoencoderKL(**_VAE, sample_size=512, scaling_factor=0.18215),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**_CLIP_L)),
    "scheduler": lambda: PNDMScheduler(**_BETAS, skip_prk_steps=True),
}
_SDXL: dict[str, Callable[[], Any]] = {
    "unet": lambda: UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "vae": lambda: AutoencoderKL(**_VAE, sample_size=1024, scaling_factor=0.13025),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**_CLIP_L, projection_dim=768)),
    "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_G, projection_dim=1280)),
    "scheduler": lambda: EulerDiscreteScheduler(**_BETAS, use_karras_sigmas=False),
}
PIPELINES = {"sd15": _SD15, "sdxl": _SDXL}
_MARKER = "random_weights.txt"


def write_pipeline(name: str, folder: str | Path, weights: bool = True, device: str = "cpu") -> Path:
    """A complete pipeline folder; one that is there already is taken as it is.

    Args:
        name: ``sd15`` or ``sdxl``.
        folder: Where to write it: 4.3 GB for ``sd15`` and 14 GB for ``sdxl``.
        weights: Otherwise only the configs and tokenizers are written: kilobytes.
        device: Where the weights are drawn: a GPU needs a moment.
    """
    folder = Path(folder)
    if (folder / _MARKER).exists() and (not weights or any((folder / "unet").glob("*.safetensors"))):
        return folder
    parts = PIPELINES[name]
    with atomic_folder(folder, marker=_MARKER) as part:
        for subfolder, make in parts.items():
            if weights:
                with torch.device(device):
                    model = make()
                model.save_pretrained(
                    part / subfolder, **({} if subfolder == "scheduler" else {"max_shard_size": "50GB"})
                )
                del model
                continue
            with torch.device("cpu" if subfolder == "scheduler" else "meta"):
                model = make()
            config = model.config if subfolder.startswith("text") else model
            (config.save_pretrained if subfolder.startswith("text") else config.save_config)(part / subfolder)
        tokenizer = CLIPTokenizer.from_pretrained(base_path(), subfolder="tokenizer")
        for subfolder in parts:
            if subfolder.startswith("text_encoder"):
                tokenizer.save_pretrained(part / subfolder.replace("text_encoder", "tokenizer"))
        (part / _MARKER).write_text(f"{name} with random weights, for measuring\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PIPELINES)
    parser.add_argument("folder")
    options = parser.parse_args()
    print(write_pipeline(options.name, options.folder))
