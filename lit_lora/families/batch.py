"""Types of a batch and of a denoiser's conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from lit_lora.errors import UserError
from lit_lora.to_device import to_device

Batch = Mapping[str, Any]
"""A batch of ``B`` samples, as a datamodule gives it:

| key | value |
|---|---|
| ``pixel_values`` | uint8 in [0, 255] or float in [-1, 1], ``(B, 3, H, W)`` |
| ``caption`` | list of ``B`` strings |
| ``original_size`` | int64 ``(B, 2)``: height, width before resizing (optional) |
| ``crop_top_left`` | int64 ``(B, 2)``: top, left of the crop in resized pixels (optional) |
| ``target_size`` | int64 ``(B, 2)``: height, width of the images to train on, ``H, W`` (optional) |
| ``weight`` | float32 ``(B,)``: 0 for a padding sample that must not count (optional) |
| ``slot`` | list of ``B`` ints: number of the sample's place in the whole run; see ``Draws`` (optional) |
| ``key`` | list of ``B`` strings, the samples' names (optional) |
| ``loss_mask`` | uint8 ``(B, 1, H, W)``: 255 where the loss counts, 0 where it does not (optional) |
| ``source_pixel_values`` | source images of editing pairs, like ``pixel_values`` (for families with ``takes_sources`` alone) |

A batch from a cache has the VAE's posterior instead of ``pixel_values``: ``latents_mean`` and ``latents_std``, float
``(B, *latent_shape)``; it always has ``target_size``. Its ``loss_mask`` is float32 in [0, 1], ``(B, 1, h, w)``, and
``source_latents``, the posterior's mean, float ``(B, *latent_shape)``, takes the place of ``source_pixel_values``. If text is
cached too, ``text_embeddings`` is the dict of tensors ``(B, …)`` that :meth:`ModelFamily.encode_captions` returns, and
``empty_text_embeddings`` is the same for one empty caption, without the batch dimension.
"""

Conditioning = dict[str, Any]
"""Keyword arguments of the denoiser's ``forward``."""


def source_images(batch: Batch) -> dict[str, list[Image.Image]]:
    """The option ``sources`` of :func:`lit_lora.sampling.generate` for a batch of editing pairs; none for other batches.

    Raises:
        UserError: If the batch has the latents of its sources alone, from a cache.
    """
    if "source_latents" in batch:
        raise UserError(
            "the source images of this batch are latents from a cache, and the pipeline edits images: predict over shards "
            "without a cache"
        )
    if "source_pixel_values" not in batch:
        return {}
    pixels = batch["source_pixel_values"]
    if pixels.is_floating_point():
        pixels = (pixels.float() + 1) * 127.5
    return {"sources": [to_pil_image(one) for one in pixels.round().clamp(0, 255).to("cpu", torch.uint8)]}


def target_size(batch: Batch) -> Tensor:
    """Height and width of the images to train on, int64 ``(B, 2)``."""
    if "target_size" in batch:
        size: Tensor = batch["target_size"]
        return size
    pixel_values = batch["pixel_values"]
    return to_device(torch.tensor([pixel_values.shape[-2:]]), pixel_values.device).expand(len(pixel_values), 2)
