"""Samples whose loss counts only in a part of the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_lora.loss_mask import mask_of_latents

if TYPE_CHECKING:
    from lit_lora.objectives.base import NoisySample


def masked(sample: NoisySample, batch: Mapping[str, Any]) -> NoisySample:
    """The noisy samples with the masks of a batch, if it has ``loss_mask``; otherwise unchanged.

    Args:
        sample: Result of :meth:`Objective.sample` for the batch.
        batch: Batch: see :data:`lit_lora.families.Batch`.
    """
    if "loss_mask" not in batch:
        return sample
    return sample._replace(mask=mask_of_latents(batch["loss_mask"], sample.latents.shape[-2:]))
