"""From the members of a sample to what a batch holds of it: images with captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.decode import check_pixels, decode_rgb
from lit_lora.datamodules.decoding.framing import Framing
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.scan import IMAGE_EXTENSIONS


@dataclass(frozen=True)
class ImageDecoder(SampleDecoder):
    """Decodes the image, frames it, and draws the caption.

    Args:
        framing: How images take their size.
        captions: Where captions are.
        seed: Captions are drawn from this and the slot.
    """

    framing: Framing
    captions: Captions
    seed: int

    @property
    def required(self) -> dict[str, tuple[str, ...]]:
        return {"image": IMAGE_EXTENSIONS, "caption": self.captions.extensions}

    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        framed = self.framing(decode_image(members, image_size), slot, size)
        return {
            "pixel_values": framed.pixels,
            "caption": self.captions.draw(members, self.seed, slot),
            "original_size": framed.original_size,
            "crop_top_left": framed.crop_top_left,
            "target_size": size,
        }

    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        return {
            "pixel_values": torch.zeros(3, *size, dtype=torch.uint8),
            "caption": "",
            "original_size": size,
            "crop_top_left": (0, 0),
            "target_size": size,
        }


def decode_image(members: Mapping[str, bytes], image_size: tuple[int, int]) -> Tensor:
    """The image of a sample, uint8 (3, H, W).

    Args:
        members: The sample's members by extension; of several images, the first of ``IMAGE_EXTENSIONS`` counts.
        image_size: Its width and height according to the index.

    Raises:
        BadSampleError: It is too large or cannot be decoded.
    """
    check_pixels(*image_size)
    return decode_rgb(next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members))
