"""Captions of more tokens than a text encoder reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lit_lora.cut_prompts import cut_text

_told: WeakSet[Any] = WeakSet()
"""The tokenizers of which a warning has told."""


def tell_cut_captions(
    tokenizer: Any,
    texts: Sequence[str],
    mask: Tensor,
    captions: Sequence[str],
    parts: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Warn, once for each tokenizer, that the end of a text was cut off, unless another tokenizer reads more of it.

    Args:
        tokenizer: The tokenizer.
        texts: ``B`` texts that it was given.
        mask: 1 for tokens, 0 for padding, ``(B, most)``.
        captions: The captions in these texts, which may have a template around them, for the message.
        parts: Parts of the pipeline, among which other tokenizers may be. Defaults to none.
        **options: Options that the tokenizer was given, as far as they change the number of tokens.
    """
    if tokenizer in _told or isinstance(mask, FakeTensor):  # a plan of the memory has no values
        return
    others = [part for name, part in (parts or {}).items() if name.startswith("tokenizer") and part is not tokenizer]
    if any(getattr(other, "model_max_length", 0) > tokenizer.model_max_length for other in others):
        return
    full = mask.bool().all(dim=1)
    for text, caption, is_full in zip(texts, captions, full.tolist(), strict=True):
        if not is_full:
            continue
        # Only a text that fills all places can be longer.
        lost = "the end of it and of others as long is not trained on"
        cut = cut_text("caption", caption, text, tokenizer, mask.shape[1], lost, **options)
        if cut is not None:
            _told.add(tokenizer)
            rank_zero_warn(f"{cut}; shorten them")
            return
