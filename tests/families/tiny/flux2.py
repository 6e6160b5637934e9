"""A tiny FLUX.2 dev, and a tiny FLUX.2 klein."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

from lit_lora.families import Flux2
from tests.families.tiny_qwen3 import qwen3_tokenizer, tiny_qwen3_config

FAMILY = Flux2
OPTIONS = {"klein": {"klein": True}}

_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
_OF_IMAGES = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
_TEMPLATE = (
    "<s>{% for message in messages %}{% set text = message.content[0].text %}{% if message.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)
"""Mistral Small's chat template for one system message and the messages of users."""


def write(folder: Path, klein: bool = False, distilled: bool = False) -> Path:
    """Save a pipeline of two double and two single blocks, whose text encoder has as many layers as the pipeline reads.

    Args:
        folder: Folder to write.
        klein: Whether to write klein, with Qwen3 and without a guidance embedding; defaults to False.
        distilled: Whether the pipeline's config says that klein is distilled; defaults to False.
    """
    torch.manual_seed(11)
    parts: dict[str, Any] = {
        "transformer": Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=not klein,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": _vae(),
    }
    if klein:
        encoder, tokenizer = Qwen3ForCausalLM(tiny_qwen3_config(16, layers=28)), qwen3_tokenizer()
        Flux2KleinPipeline(**parts, text_encoder=encoder, tokenizer=tokenizer, is_distilled=distilled).save_pretrained(
            folder
        )
    else:
        processor = _processor()
        encoder = _mistral(len(processor.tokenizer))
        Flux2Pipeline(**parts, text_encoder=encoder, tokenizer=processor).save_pretrained(folder)
    return folder


def _vae() -> AutoencoderKLFlux2:
    """A VAE whose latents have half the edge of the image, with statistics for each place in a patch."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    torch.nn.init.normal_(vae.bn.running_mean, std=0.3)
    torch.nn.init.uniform_(vae.bn.running_var, 0.2, 2)
    return vae


def _processor() -> PixtralProcessor:
    """A processor with Mistral's special tokens, to which each word of the system message is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=[*_SPECIAL, *_OF_IMAGES], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SYSTEM_MESSAGE], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=[*_SPECIAL[4:], *_OF_IMAGES],
    )
    return PixtralProcessor(PixtralImageProcessor(), fast, chat_template=_TEMPLATE)


def _mistral(tokens: int) -> Mistral3ForConditionalGeneration:
    """Mistral Small with 31 layers, for what comes before the last is not normalized."""
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": tokens,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": 16,
            "image_size": 28,
        },
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config)
