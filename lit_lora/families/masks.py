"""Masks of text embeddings."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def token_counts(mask: Tensor) -> list[int]:
    """Number of tokens of each caption up to the last one in its mask, at least 1.

    In a plan, whose tensors have no contents, every caption has the full number.

    Args:
        mask: 0 for padding, ``(B, tokens)``.
    """
    batch, tokens = mask.shape
    if isinstance(mask, FakeTensor):
        return [tokens] * batch
    last = mask.ne(0).int().flip(1).argmax(dim=1)  # tokens after the last one in the mask
    counts: list[int] = (tokens - last).where(mask.any(dim=1), 1).tolist()
    return counts


def unpadded(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embeddings and mask without the padding that all captions have, and without a mask if no padding is left.

    Args:
        hidden: Embeddings, ``(B, tokens, …)``, padding last.
        mask: 0 for padding, ``(B, tokens)``.
    """
    counts = token_counts(mask)
    longest = max(counts)
    return hidden[:, :longest], mask[:, :longest] if min(counts) < longest else None
