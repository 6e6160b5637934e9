"""The decoder of images with captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from PIL import ImageColor
from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.decode import BadSampleError, check_pixels, decode_rgb
from lit_lora.datamodules.decoding.framing import Framing
from lit_lora.datamodules.decoding.mask import MaskSource, decode_mask
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.extensions import IMAGE_EXTENSIONS, MASK_EXTENSION
from lit_lora.datamodules.indexing.scan import image_size
from lit_lora.errors import UserError


@dataclass(frozen=True)
class ImageDecoder(SampleDecoder):
    """Decodes images with captions: decodes, resizes and crops the image, and draws the caption.

    The image is resized until it covers the planned size, flipped, and cropped; see
    :class:`~lit_lora.datamodules.decoding.framing.Framing`.

    Args:
        center_crop: Whether to crop training images at the center instead of at a random position. Defaults to false.
            Validation and test images are always cropped at the center.
        random_flip: Whether to flip half of the training images horizontally. Defaults to false.
        captions: Sources and augmentation of captions. Defaults to the caption in ``.txt``, or else in ``.json``.
        mask: Masks of the training images, for losses that count only in a part of the image: ``mask.png`` for the member of
            this name in each sample, or ``alpha`` for the image's alpha channel. Defaults to null: the whole image counts.
        background: Color behind transparent parts of images, such as ``white`` or ``#808080``. Defaults to null: the colors that
            files have there, which nobody sees and which are often black.

    Raises:
        UserError: If ``background`` is no color.
    """

    pairs: ClassVar[bool] = False
    """Whether samples are editing pairs, with a source image."""

    center_crop: bool = False
    random_flip: bool = False
    captions: Captions = Captions()  # noqa: RUF009 it is frozen
    mask: MaskSource | None = None
    background: str | None = None
    _seed: int = 0  # private, since it is not an option: the datamodule sets it

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if self.background is not None:
            try:
                ImageColor.getrgb(self.background)
            except ValueError as error:
                raise UserError(
                    f"background={self.background!r} is no color; give a name such as white, or #rrggbb"
                ) from error

    @property
    def framing(self) -> Framing:
        """The conversion of an image to its training size."""
        return Framing(self.center_crop, self.random_flip, self._seed)

    @property
    def required(self) -> dict[str, tuple[str, ...]]:
        masks = {"mask": (MASK_EXTENSION,)} if self.mask == MASK_EXTENSION else {}
        return {"image": IMAGE_EXTENSIONS, "caption": self.captions.extensions, **masks}

    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        framed = self.framing(decode_image(members, image_size, self.background), slot, size)
        entries = {
            "pixel_values": framed.pixels,
            "caption": self.captions.draw(members, self._seed, slot),
            "original_size": framed.original_size,
            "crop_top_left": framed.crop_top_left,
            "target_size": size,
        }
        if self.mask is None:
            return entries
        return entries | {"loss_mask": self.framing(decode_mask(members, self.mask, image_size), slot, size).pixels}

    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        return {
            "pixel_values": torch.zeros(3, *size, dtype=torch.uint8),
            "caption": "",
            "original_size": size,
            "crop_top_left": (0, 0),
            "target_size": size,
            **({} if self.mask is None else {"loss_mask": torch.zeros(1, *size, dtype=torch.uint8)}),
        }

    def with_seed(self, seed: int) -> Self:
        return replace(self, _seed=seed)

    def for_evaluation(self) -> Self:
        """The same decoder with center crops, and without flips and masks. Captions are drawn as in training."""
        return replace(self, center_crop=True, random_flip=False, mask=None)


def decode_image(members: Mapping[str, bytes], indexed_size: tuple[int, int], background: str | None = None) -> Tensor:
    """The image of a sample, uint8 (3, H, W).

    Args:
        members: The sample's members by extension; of several images, the first in ``IMAGE_EXTENSIONS`` is used.
        indexed_size: Width and height of the image according to the index, in pixels.
        background: Color behind transparent parts; see :func:`decode_rgb`.

    Raises:
        BadSampleError: If there is no image, or it is too large, of another size, or cannot be decoded.
    """
    data = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if data is None:
        raise BadSampleError("there is no image")
    check_pixels(*indexed_size)
    # The index may be wrong, and decoding would reserve the memory for any size.
    size = image_size(data)
    check_pixels(*size)
    if size != indexed_size:
        raise BadSampleError(
            f"the image has {size[0]} x {size[1]} pixels, but {indexed_size[0]} x {indexed_size[1]} in the index"
        )
    return decode_rgb(data, background)
