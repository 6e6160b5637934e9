"""A tiny PixArt-Sigma pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from lit_lora.families import PixArtSigma
from tests.tiny_pipelines import t5_tokenizer, tiny_t5, tiny_vae

FAMILY = PixArtSigma


def write(folder: Path, **options: Any) -> Path:
    """Two blocks, and a schedule with less noise than the published one; ``options`` go to the transformer."""
    torch.manual_seed(7)
    transformer = PixArtTransformer2DModel(
        **{"sample_size": 8, "use_additional_conditions": False} | options,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=12,
        cross_attention_dim=48,
        caption_channels=32,
    )
    PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.008),
        vae=tiny_vae(),
        text_encoder=tiny_t5(32),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder
