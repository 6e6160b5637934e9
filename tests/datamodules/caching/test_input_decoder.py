"""What the encoders of a cache get is what a run without a cache gets."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image

from lit_lora.datamodules.caching.cached_decoder import FLIPPED, MASK
from lit_lora.datamodules.caching.input_decoder import SOURCE_PIXELS, InputDecoder
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.edit_decoder import EditDecoder


def encoded(color: tuple[int, int, int]) -> bytes:
    image = Image.new("RGBA", (64, 32), (*color, 255))
    image.paste((0, 0, 0, 0), (0, 0, 40, 32))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("background", [None, "white"])
def test_images_masks_and_sources(background: str | None) -> None:
    members = {"png": encoded((200, 0, 0)), "txt": b"a", "source.png": encoded((0, 200, 0))}
    decoder = InputDecoder(Captions(), True, ("", FLIPPED), "alpha", pairs=True, background=background)
    run = EditDecoder(center_crop=True, mask="alpha", background=background)
    found: dict[str, Any] = decoder(members, 0, (16, 16), (64, 32))
    wanted: dict[str, Any] = run(members, 0, (16, 16), (64, 32))
    for ours, theirs in (("pixel_values", "pixel_values"), (MASK, "loss_mask"), (SOURCE_PIXELS, SOURCE_PIXELS)):
        assert torch.equal(found[ours], wanted[theirs])
        assert torch.equal(found[ours + FLIPPED], wanted[theirs].flip(-1))
    assert found["pixel_values"][:, 0, 0].tolist() == [0 if background is None else 255] * 3
