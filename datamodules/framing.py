"""How an image becomes a square of the training resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lit_lora.datamodules.decode import MAX_PIXELS, BadSampleError
from lit_lora.draws import seed_of


class FramedImage(NamedTuple):
    """A square image, and what SDXL wants to know of its making.

    Attributes:
        pixels: uint8 (3, R, R).
        original_size: Height and width before anything was done, in pixels.
        crop_top_left: Top and left of the crop in the resized (and flipped) image, in pixels.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


@dataclass(frozen=True)
class Framing:
    """Resize the short side, flip, crop: the same steps as diffusers' ``train_text_to_image_lora_sdxl.py``.

    Args:
        resolution: Side of the square R, in pixels.
        center_crop: Crop the middle; otherwise a random place.
        random_flip: Mirror half of the images left to right.
        seed: The random choices are a function of this and the slot.
    """

    resolution: int
    center_crop: bool
    random_flip: bool
    seed: int

    def __call__(self, image: Tensor, slot: int) -> FramedImage:
        """Frame one image.

        Args:
            image: uint8 (3, H, W).
            slot: The place of the sample in the whole run.

        Raises:
            BadSampleError: The image is so narrow that resizing it would take more than ``MAX_PIXELS``.
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        height, width = image.shape[-2:]
        if max(height, width) / min(height, width) * self.resolution**2 > MAX_PIXELS:
            raise BadSampleError(f"the image of {width} x {height} pixels is too narrow")
        resized = F.resize(image, [self.resolution], InterpolationMode.BICUBIC, antialias=True)
        if self.random_flip and self._generator("flip", slot).random() < 0.5:
            resized = F.horizontal_flip(resized)
        top, left = self._crop(resized.shape[-2], resized.shape[-1], slot)
        pixels = resized[:, top : top + self.resolution, left : left + self.resolution]
        return FramedImage(pixels, (height, width), (top, left))

    def _crop(self, height: int, width: int, slot: int) -> tuple[int, int]:
        spare_height, spare_width = height - self.resolution, width - self.resolution
        if self.center_crop:
            return round(spare_height / 2), round(spare_width / 2)
        generator = self._generator("crop", slot)
        return int(generator.integers(spare_height + 1)), int(generator.integers(spare_width + 1))

    def _generator(self, name: str, slot: int) -> np.random.Generator:
        return np.random.default_rng(seed_of(self.seed, name, slot))
