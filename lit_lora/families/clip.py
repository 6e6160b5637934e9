"""Outputs of CLIP text encoders that several families take."""

from __future__ import annotations

from torch import Tensor

from lit_lora.families.base import ModelFamily


def clip_outputs(family: ModelFamily, suffix: str, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Hidden states of the last layer but one of a CLIP encoder, ``(B, n, D)``, and its first output.

    Args:
        family: Family with the encoder and its tokenizer.
        suffix: End of their names, such as ``_2``.
        captions: ``B`` captions.
    """
    ids = family.tokenize(family.encoders[f"tokenizer{suffix}"], captions)
    output = family.encoders[f"text_encoder{suffix}"](ids, output_hidden_states=True)
    return output.hidden_states[-2], output[0]
