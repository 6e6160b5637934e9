"""A tiny Chroma pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from lit_lora.families import Chroma
from tests.tiny_pipelines import t5_tokenizer, tiny_t5, tiny_vae

FAMILY = Chroma


def write(folder: Path) -> Path:
    """Two blocks of each kind."""
    torch.manual_seed(6)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_t5(32),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder
