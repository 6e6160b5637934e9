"""Resizing, flipping and cropping of images to their training size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lit_lora.datamodules.decoding.decode import MAX_PIXELS, BadSampleError
from lit_lora.draws import seed_of


class FramedImage(NamedTuple):
    """An image at its training size, with the size and crop on which SDXL is conditioned.

    Attributes:
        pixels: uint8 (C, H, W).
        original_size: Height and width before resizing, in pixels.
        crop_top_left: Top and left of the crop in the resized (and flipped) image, in pixels.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


@dataclass(frozen=True)
class Framing:
    """Resizes an image to cover the planned size, flips it, and crops it.

    For squares these are the steps of diffusers' ``train_text_to_image_lora_sdxl.py``.

    Args:
        center_crop: Whether to crop at the center; otherwise at a random position.
        random_flip: Whether to flip half of the images horizontally.
        seed: Seed of the random choices, which depend on it and the slot.
    """

    center_crop: bool
    random_flip: bool
    seed: int

    def __call__(
        self, image: Tensor, slot: int, size: tuple[int, int], like: tuple[int, int] | None = None
    ) -> FramedImage:
        """Frame one image.

        Args:
            image: Image or mask, uint8 (C, H, W).
            slot: Number of this occurrence of the sample.
            size: Planned height and width, in pixels.
            like: Height and width of the image that this one is framed like, so that both show the same part. Defaults to its
                own.

        Raises:
            BadSampleError: If the image is so narrow that the resized image would have more than ``MAX_PIXELS``.
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        height, width = image.shape[-2:]
        covering = _covering_size(like or (height, width), size)
        if covering[0] * covering[1] > MAX_PIXELS:
            raise BadSampleError(f"the image of {width} x {height} pixels is too narrow")
        resized = F.resize(image, list(covering), InterpolationMode.BICUBIC, antialias=True)
        if self.flips(slot):
            resized = F.horizontal_flip(resized)
        top, left = self._crop(covering[0] - size[0], covering[1] - size[1], slot)
        pixels = resized[:, top : top + size[0], left : left + size[1]]
        return FramedImage(pixels, (height, width), (top, left))

    def flips(self, slot: int) -> bool:
        """Whether the image is flipped at this occurrence."""
        return self.random_flip and bool(self._generator("flip", slot).random() < 0.5)

    def _crop(self, spare_height: int, spare_width: int, slot: int) -> tuple[int, int]:
        if self.center_crop:
            return round(spare_height / 2), round(spare_width / 2)
        generator = self._generator("crop", slot)
        return int(generator.integers(spare_height + 1)), int(generator.integers(spare_width + 1))

    def _generator(self, name: str, slot: int) -> np.random.Generator:
        return np.random.default_rng(seed_of(self.seed, name, slot))


def _covering_size(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size with the image's aspect ratio that covers ``size``; all sizes are height and width."""
    if size[0] * image[1] >= size[1] * image[0]:
        return size[0], size[0] * image[1] // image[0]
    return size[1] * image[0] // image[1], size[1]
