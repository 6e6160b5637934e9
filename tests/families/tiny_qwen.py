"""Tiny parts of pipelines with Qwen's text encoders and VAE."""

from __future__ import annotations

from diffusers import AutoencoderKLQwenImage
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

_FIRST = ("system", "Describe", "user", "assistant")
_FURTHER = (
    *("the", "image", "by", "detailing", "color", "shape", "size", "texture", "quantity", "text", "spatial"),
    *("relationships", "of", "objects", "and", "background"),
)
"""Words of the prompt template at the beginning of a line, and after a space."""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of bytes, to which each word of Qwen-Image's prompt template is one token, as to Qwen's own."""
    words = [*_FIRST, *(f"\u0120{word}" for word in _FURTHER)]  # byte-level BPE's sign for a space
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), *(first + second for first, second in merges)]
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        additional_special_tokens=special[1:],
    )


def tiny_qwen_vae() -> AutoencoderKLQwenImage:
    """A VAE whose latents have half the edge of the image."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 1.0, 2.0],
    )
