"""What a batch holds, and what a denoiser is told beside its latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]
"""What a datamodule gives, ``B`` samples:

| key | value |
|---|---|
| ``pixel_values`` | uint8 in [0, 255] or float in [-1, 1], ``(B, 3, H, W)`` |
| ``caption`` | list of ``B`` strings |
| ``original_size`` | int64 ``(B, 2)``: height, width before resizing (optional) |
| ``crop_top_left`` | int64 ``(B, 2)``: top, left of the crop in resized pixels (optional) |
| ``target_size`` | int64 ``(B, 2)``: height, width of the images to train on, ``H, W`` (optional) |
| ``weight`` | float32 ``(B,)``: 0 for a slot that must not count (optional) |
| ``slot`` | list of ``B`` ints: number of the sample's place in the whole run (optional) |
| ``key`` | list of ``B`` strings, the samples' names (optional) |

From a cache ``latents_mean`` and ``latents_std``, float ``(B, *latent_shape)``, the VAE's posterior, stand in for
``pixel_values``, and ``target_size`` is there. Where text is cached too, ``text_embeddings`` is a dict of tensors
``(B, …)``, what :meth:`ModelFamily.encode_captions` gives, and ``empty_text_embeddings`` the same for one empty caption,
without the batch dimension.
"""

Conditioning = dict[str, Any]
"""Keyword arguments of the denoiser's ``forward``."""


def target_size(batch: Batch) -> Tensor:
    """Height and width of the images to train on, int64 ``(B, 2)``."""
    if "target_size" in batch:
        size: Tensor = batch["target_size"]
        return size
    pixel_values = batch["pixel_values"]
    return torch.tensor([pixel_values.shape[-2:]], device=pixel_values.device).expand(len(pixel_values), 2)
