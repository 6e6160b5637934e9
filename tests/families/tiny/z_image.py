"""A tiny Z-Image."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Model

from lit_lora.families.z_image import ZImage
from tests.families.tiny_qwen3 import qwen3_tokenizer, tiny_qwen3_config
from tests.tiny_pipelines import tiny_vae

FAMILY = ZImage


def write(folder: Path) -> Path:
    """Save a pipeline of two blocks and two refiners."""
    torch.manual_seed(6)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[544, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=Qwen3Model(tiny_qwen3_config()),
        tokenizer=qwen3_tokenizer(),
    ).save_pretrained(folder)
    return folder
