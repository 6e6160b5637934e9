"""Pipelines of transformer models in diffusers' folder format, with random weights, for images of 16 px."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def tiny_vae(latent_channels: int = 4, shift_factor: float | None = None) -> AutoencoderKL:
    """A VAE whose latents have half the edge of the image."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=shift_factor,
    )


def tiny_clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """A CLIP text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer that knows letters."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def tiny_t5(width: int = 32) -> T5EncoderModel:
    """A T5 encoder of two layers."""
    config = T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, use_cache=False)
    return T5EncoderModel(config)


def write_sd3(folder: Path, tokenizer: CLIPTokenizer, t5: bool = True) -> Path:
    """A Stable Diffusion 3 pipeline."""
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=48,
        pooled_projection_dim=16 + 24,
        out_channels=4,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(tiny_clip_config(tokenizer, 16)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip_config(tokenizer, 24)),
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5(48) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    ).save_pretrained(folder)
    return folder


def write_flux(folder: Path, tokenizer: CLIPTokenizer, guidance: bool = True) -> Path:
    """A FLUX.1 pipeline: dev with the guidance embedding, schnell without."""
    torch.manual_seed(4)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    FluxPipeline(
        transformer=transformer,
        scheduler=scheduler if guidance else FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(tiny_clip_config(tokenizer, 16)),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(32),
        tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder
