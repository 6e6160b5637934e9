"""A tiny Qwen3 and its tokenizer, which knows single bytes."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's chat template for the messages of users."""


def qwen3_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer with Qwen3's special tokens and chat template, whose other tokens are bytes."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def tiny_qwen3_config(width: int = 32, layers: int = 3) -> Qwen3Config:
    """The config of a Qwen3 for the tokenizer's tokens.

    Args:
        width: Size of the hidden states.
        layers: Number of layers.
    """
    return Qwen3Config(
        vocab_size=len(qwen3_tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
