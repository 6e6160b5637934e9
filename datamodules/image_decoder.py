"""From the members of a sample to what a batch holds of it: images with captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lit_lora.datamodules.captions import Captions
from lit_lora.datamodules.decode import check_pixels, decode_rgb
from lit_lora.datamodules.framing import Framing
from lit_lora.datamodules.indexing.scan import IMAGE_EXTENSIONS


@dataclass(frozen=True)
class ImageDecoder:
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
        """What each sample must have: by name, members of which one is enough."""
        return {"image": IMAGE_EXTENSIONS, "caption": self.captions.extensions}

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that are read."""
        return (*IMAGE_EXTENSIONS, *self.captions.extensions)

    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        """The entries of one sample in a batch.

        Args:
            members: Its members by extension.
            slot: The number of this showing of the sample.
            size: Height and width that are wanted, in pixels.
            image_size: Width and height of the image according to the index.

        Raises:
            BadSampleError: The image or the caption cannot be used.
        """
        check_pixels(*image_size)
        image = next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members)
        framed = self.framing(decode_rgb(image), slot, size)
        return {
            "pixel_values": framed.pixels,
            "caption": self.captions.draw(members, self.seed, slot),
            "original_size": framed.original_size,
            "crop_top_left": framed.crop_top_left,
            "target_size": size,
        }

    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        """Entries for a batch in which no sample can be used."""
        return {
            "pixel_values": torch.zeros(3, *size, dtype=torch.uint8),
            "caption": "",
            "original_size": size,
            "crop_top_left": (0, 0),
            "target_size": size,
        }

    def batch_entries(self) -> dict[str, Any]:
        """What each batch holds besides."""
        return {}
