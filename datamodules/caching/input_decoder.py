"""The decoder of the inputs of the encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lit_lora.datamodules.caching.cached_decoder import FLIPPED, MASK, SIZES
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.edit_decoder import EditDecoder
from lit_lora.datamodules.decoding.framing import Framing
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder, decode_image
from lit_lora.datamodules.decoding.mask import MaskSource, decode_mask
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.decoding.source_image import decode_source

SOURCE_PIXELS = "source_pixel_values"
"""Name of the entry of a batch with the source images of editing pairs."""


@dataclass(frozen=True)
class InputDecoder(SampleDecoder):
    """Decodes the inputs of the encoders: a sample's image, mask and source image, all also flipped, and its caption."""

    captions: Captions
    text: bool
    sides: tuple[str, ...]
    mask: MaskSource | None
    pairs: bool
    background: str | None

    @property
    def required(self) -> dict[str, tuple[str, ...]]:
        kind = EditDecoder if self.pairs else ImageDecoder
        return kind(captions=self.captions, mask=self.mask).required

    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        image = decode_image(members, image_size, self.background)
        mask = None if self.mask is None else decode_mask(members, self.mask, image_size)
        source = decode_source(members, image_size, self.background) if self.pairs else None
        entries = self._caption(members)
        for side in reversed(self.sides):  # the sizes are those of the image that is not flipped
            framing = _FRAMINGS[side]
            framed = framing(image, slot, size)
            entries |= {
                f"pixel_values{side}": framed.pixels,
                "original_size": framed.original_size,
                "crop_top_left": framed.crop_top_left,
                "target_size": size,
            }
            if mask is not None:
                entries[MASK + side] = framing(mask, slot, size).pixels
            if source is not None:
                entries[SOURCE_PIXELS + side] = framing(source, slot, size, like=framed.original_size).pixels
        return entries

    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        pixels = torch.zeros(3, *size, dtype=torch.uint8)
        entries: dict[str, Any] = {f"pixel_values{side}": pixels for side in self.sides}
        if self.mask is not None:
            entries |= {MASK + side: pixels[:1] for side in self.sides}
        if self.pairs:
            entries |= {SOURCE_PIXELS + side: pixels for side in self.sides}
        return entries | dict.fromkeys(SIZES, size) | {"caption": "", "caption_members": []}

    def _caption(self, members: Mapping[str, bytes]) -> dict[str, Any]:
        """The caption, and the members that hold it in the cached sample."""
        if self.text:
            caption = self.captions.draw_fixed(members)
            return {"caption": caption, "caption_members": [("txt", caption.encode())]}
        kept = [(name, data) for name, data in members.items() if name in self.captions.extensions]
        return {"caption": "", "caption_members": kept}


class _FlippedFraming(Framing):
    """A framing that flips every image."""

    def flips(self, slot: int) -> bool:
        return True


_FRAMINGS = {
    "": Framing(center_crop=True, random_flip=False, seed=0),
    FLIPPED: _FlippedFraming(center_crop=True, random_flip=True, seed=0),
}
