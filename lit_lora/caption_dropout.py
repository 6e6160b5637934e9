"""Caption dropout, which classifier-free guidance is trained with (Ho and Salimans 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.families import Batch
from lit_lora.to_device import to_device


def drop_captions(batch: Batch, draws: Draws, probability: float) -> Batch:
    """A batch in which some captions are empty, or replaced by the embeddings of the empty caption.

    Args:
        batch: Batch with captions, or with text embeddings from a cache.
        draws: Random numbers of the batch's samples.
        probability: Probability of each caption to be dropped.
    """
    if not probability:
        return batch
    # Drawn on the CPU, which would have to wait for the GPU's.
    dropped = Draws(draws.seed, draws.slots).uniform("caption dropout") < probability
    if "text_embeddings" in batch:
        empty, rows = batch["empty_text_embeddings"], to_device(dropped, draws.device)
        embeddings = {name: _replace(v, rows, empty[name]) for name, v in batch["text_embeddings"].items()}
        return {**batch, "text_embeddings": embeddings}
    captions = ["" if drop else caption for caption, drop in zip(batch["caption"], dropped.tolist(), strict=True)]
    return {**batch, "caption": captions}


def _replace(values: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """``values``, ``(B, …)``, with ``value`` in the rows that are true in ``rows``, ``(B,)``."""
    return torch.where(rows.view(-1, *[1] * value.ndim), value, values)
