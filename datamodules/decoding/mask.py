"""Masks that tell which part of an image is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_lora.datamodules.decoding.decode import BadSampleError, decode_alpha, decode_rgb
from lit_lora.datamodules.indexing.extensions import IMAGE_EXTENSIONS, MASK_EXTENSION
from lit_lora.datamodules.indexing.scan import image_size

MaskSource = Literal["mask.png", "alpha"]
"""Where the mask of a sample is: in a member of its own, or in the image's alpha channel."""


def decode_mask(members: Mapping[str, bytes], source: MaskSource, size: tuple[int, int]) -> Tensor:
    """The mask of a sample, uint8 (1, H, W): 255 where the image is trained on, 0 where it is not, and shares between.

    Args:
        members: The sample's members by extension.
        source: Where the mask is. Of a color image the red channel counts; an image without an alpha channel is trained on
            entirely.
        size: Width and height of the image, in pixels.

    Raises:
        BadSampleError: If there is no mask, it has another size than the image or cannot be decoded, or nothing of it counts.
    """
    mask = _read(members, source, size)
    if (largest := int(mask.max())) <= 1:  # 1 comes of masks that were saved as numbers of classes
        raise BadSampleError(
            f"the largest value in the mask is {largest}, so that the image would not count; masks are 255 (white) where the "
            f"image counts, 0 where it does not"
        )
    return mask


def _read(members: Mapping[str, bytes], source: MaskSource, size: tuple[int, int]) -> Tensor:
    if source == "alpha":
        data = next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members)
        alpha = decode_alpha(data)
        return torch.full((1, size[1], size[0]), 255, dtype=torch.uint8) if alpha is None else alpha
    if MASK_EXTENSION not in members:
        raise BadSampleError(f"there is no .{MASK_EXTENSION} member")
    data = members[MASK_EXTENSION]
    found = image_size(data)
    if found != size:
        raise BadSampleError(
            f"the mask has {found[0]} x {found[1]} pixels, and the image {size[0]} x {size[1]}"
            if found != (0, 0)
            else "the mask's header cannot be read"
        )
    return decode_rgb(data)[:1]
