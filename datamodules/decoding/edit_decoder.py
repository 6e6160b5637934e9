"""The decoder of editing pairs: source image, instruction, target image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

# The annotations of the inherited constructor are looked up in this module.
from lit_lora.argument_types import check_types
from lit_lora.datamodules.decoding.captions import Captions  # noqa: F401
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.decoding.mask import MaskSource  # noqa: F401
from lit_lora.datamodules.decoding.source_image import decode_source
from lit_lora.datamodules.indexing.extensions import SOURCE_EXTENSIONS


@dataclass(frozen=True)
class EditDecoder(ImageDecoder):
    """Decodes pairs of images with the instruction that leads from one to the other.

    The sample's image is the target and its caption the instruction; a member ``source.jpg``, ``source.png`` or ``source.webp``
    is the source. The source may have another size than the target, with the same aspect ratio. It is resized, flipped and
    cropped like the target, and is the batch's ``source_pixel_values``.

    Args:
        center_crop: Whether to crop training images at the center instead of at a random position. Defaults to false.
            Validation and test images are always cropped at the center.
        random_flip: Whether to flip half of the training pairs horizontally. Defaults to false.
        captions: Sources and augmentation of instructions. Defaults to the text in ``.txt``, or else in ``.json``.
        mask: Masks of the target images, as for ``ImageDecoder``. Defaults to null: the whole image counts.
        background: Color behind transparent parts of both images, as for ``ImageDecoder``. Defaults to null: the files' own.
    """

    pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))

    @property
    def required(self) -> dict[str, tuple[str, ...]]:
        return {**super().required, "source image": SOURCE_EXTENSIONS}

    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        entries = super().__call__(members, slot, size, image_size)
        source = decode_source(members, image_size, self.background)
        framed = self.framing(source, slot, size, like=entries["original_size"])
        return entries | {"source_pixel_values": framed.pixels}

    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        return super().blank(size) | {"source_pixel_values": torch.zeros(3, *size, dtype=torch.uint8)}
