"""What packing says of samples that training takes, and their owner may not mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lit_lora.datamodules.packing.pack import PackSummary, pack_folder
from lit_lora.errors import UserError
from lit_lora.tools.training.screen import packed_lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An opaque image, one of full alpha, and transparent ones with alpha, palette and WebP; with captions, one of them empty."""
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.new("RGBA", (8, 8), (9, 8, 7, 255))
    image.convert("RGB").save(folder / "a.jpg")
    image.save(folder / "b.png")
    image.putpixel((1, 2), (9, 8, 7, 100))
    image.save(folder / "c.png")
    image.save(folder / "d.webp", lossless=True)
    image.quantize(4).save(folder / "e.png")
    for name in "abcde":
        (folder / f"{name}.txt").write_text(name * (name != "d"))
    return folder


TRANSPARENT = (
    "3 images with transparent parts, first c.png: decoder.background is put behind them, which lit-lora train sets to white; "
    "without it their hidden colors are trained on, unless decoder.mask is alpha"
)


def test_empty_captions_and_transparent_parts_are_told(folder: Path, tmp_path: Path) -> None:
    notes = pack_folder(folder, tmp_path / "out").notes
    assert sorted(notes) == ["1 image with an empty caption, first d.webp: trained on without words", TRANSPARENT]


def test_captions_that_are_meant_to_be_empty(folder: Path, tmp_path: Path) -> None:
    """``lit-lora train`` puts the trigger before them."""
    assert pack_folder(folder, tmp_path / "out", fallback="").notes == [TRANSPARENT]


def test_a_mask_that_does_not_fit_its_image_is_bad(folder: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 4), 255).save(folder / "a.mask.png")
    with pytest.raises(UserError, match=r"a\.jpg: the mask has 8 x 4 pixels, and the image 8 x 8"):
        pack_folder(folder, tmp_path / "out")


def test_train_says_what_was_left_out_and_the_notes(folder: Path, tmp_path: Path) -> None:
    (folder / "gone.txt").write_text("of no image")
    packed: PackSummary = pack_folder(folder, tmp_path / "out")
    first, *lines = packed_lines("packed", packed)
    assert f"5 images, 20.5 kB, 1 left out (see {tmp_path / 'out' / 'bad.jsonl'})" in first
    assert lines[0] == "  1  gone.txt: is no caption of an image beside it"
    assert [line.partition(" with")[0] for line in lines[1:]] == ["note     3 images", "note     1 image"]
