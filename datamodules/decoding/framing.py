"""Resizing, flipping and cropping of images to their training size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lit_lora.datamodules.decoding.decode import MAX_PIXELS, BadSampleError
from lit_lora.draws import seed_of


class FramedImage(NamedTuple):
    """An image in its training size, with the size and crop that condition SDXL.

    Attributes:
        pixels: uint8 (3, H, W).
        original_size: Height and width before anything was done, in pixels.
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
        center_crop: Crop the middle; otherwise a random place.
        random_flip: Mirror half of the images left to right.
        seed: The random choices are a function of this and the slot.
    """

    center_crop: bool
    random_flip: bool
    seed: int

    def __call__(self, image: Tensor, slot: int, size: tuple[int, int]) -> FramedImage:
        """Frame one image.

        Args:
            image: uint8 (3, H, W).
            slot: The number of this showing of the sample.
            size: Planned height and width, in pixels.

        Raises:
            BadSampleError: If the image is so narrow that resizing it would take more than ``MAX_PIXELS``.
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        height, width = image.shape[-2:]
        covering = _covering_size((height, width), size)
        if covering[0] * covering[1] > MAX_PIXELS:
            raise BadSampleError(f"the image of {width} x {height} pixels is too narrow")
        resized = F.resize(image, list(covering), InterpolationMode.BICUBIC, antialias=True)
        if self.flips(slot):
            resized = F.horizontal_flip(resized)
        top, left = self._crop(covering[0] - size[0], covering[1] - size[1], slot)
        pixels = resized[:, top : top + size[0], left : left + size[1]]
        return FramedImage(pixels, (height, width), (top, left))

    def flips(self, slot: int) -> bool:
        """Whether this showing is mirrored."""
        return self.random_flip and bool(self._generator("flip", slot).random() < 0.5)

    def _crop(self, spare_height: int, spare_width: int, slot: int) -> tuple[int, int]:
        if self.center_crop:
            return round(spare_height / 2), round(spare_width / 2)
        generator = self._generator("crop", slot)
        return int(generator.integers(spare_height + 1)), int(generator.integers(spare_width + 1))

    def _generator(self, name: str, slot: int) -> np.random.Generator:
        return np.random.default_rng(seed_of(self.seed, name, slot))


def _covering_size(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the image's own shape that covers ``size``; all are height, width."""
    if size[0] * image[1] >= size[1] * image[0]:
        return size[0], size[0] * image[1] // image[0]
    return size[1] * image[0] // image[1], size[1]
