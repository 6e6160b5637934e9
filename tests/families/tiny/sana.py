"""A tiny Sana pipeline."""

from __future__ import annotations

import inspect
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from lit_lora.families import Sana

FAMILY = Sana

_PIECES = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.ascii_lowercase)


def write(folder: Path, **options: Any) -> Path:
    """Two blocks, an autoencoder that halves the edge of an image, and a tokenizer that knows small letters.

    It also knows the lines of the pipeline's instruction: letter by letter they are a thousand tokens of each caption.

    Args:
        folder: Folder to write.
        **options: Further arguments of the transformer.
    """
    torch.manual_seed(8)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        **{"num_layers": 2} | options,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.5,
    )
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(_PIECES)})
    tokenizer.add_tokens(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        use_cache=False,
    )
    SanaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=vae,
        text_encoder=Gemma2Model(config),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder
