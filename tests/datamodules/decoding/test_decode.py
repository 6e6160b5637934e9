from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lit_lora.datamodules.decoding.decode import (
    MAX_PIXELS,
    BadSampleError,
    check_pixels,
    decode_rgb,
    decode_text,
)


def _by_pillow(data):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_same_pixels_as_pillow(encode_image, format_):
    data = encode_image(24, 16, format_)
    image = decode_rgb(data)
    assert image.dtype == torch.uint8
    assert torch.equal(image, _by_pillow(data))


def transparent(format_: str, mode: str = "RGBA") -> bytes:
    """A red image, the left half of which is transparent, and its middle columns half so; turned by its EXIF data."""
    image = Image.new("RGBA", (8, 4), (200, 0, 0, 255))
    image.paste((0, 0, 40, 0), (0, 0, 4, 4))
    image.putpixel((4, 0), (100, 0, 0, 51))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.convert(mode).save(
        buffer, format_, exif=exif, **({"lossless": True, "exact": True} if format_ == "WEBP" else {})
    )
    return buffer.getvalue()


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_a_background_behind_transparent_parts(format_):
    data = transparent(format_)
    plain, image = decode_rgb(data), decode_rgb(data, "#0080ff")
    assert image.shape == (3, 8, 4)
    assert image.dtype == torch.uint8
    assert plain[:, 0, 0].tolist() == [0, 0, 40]
    assert image[:, 0, 0].tolist() == [0, 128, 255]
    assert image[:, 7, 0].tolist() == plain[:, 7, 0].tolist() == [200, 0, 0]
    # 51 / 255 of the color over the background
    assert image[:, 4, 3].tolist() == [20, 102, 204]


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_colors_and_transparency_are_decoded_at_once(format_, monkeypatch):
    data, read = transparent(format_), []
    monkeypatch.setattr("lit_lora.datamodules.decoding.decode._decode_colors", None)
    open_ = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: read.append(args) or open_(*args, **options))
    decode_rgb(data, "white")
    assert len(read) == 1


def test_gray_images_and_palettes_have_transparent_parts_too():
    assert decode_rgb(transparent("PNG", "LA"), "white")[:, 0, 0].tolist() == [255] * 3
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    assert decode_rgb(buffer.getvalue(), "white")[0].tolist() == [[255, 9]]


def test_opaque_images_have_no_background(encode_image):
    for format_ in ("JPEG", "PNG", "WEBP"):
        data = encode_image(24, 16, format_)
        assert torch.equal(decode_rgb(data, "white"), decode_rgb(data))


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_upright(encode_image, orientation, format_):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode_image(24, 16, format_, exif=exif)
    assert torch.equal(decode_rgb(data), _by_pillow(data))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
def test_other_modes_become_rgb(mode):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (200, 30, 60)).convert(mode).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue()).shape == (3, 4, 5)


def test_16_bit_png():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5), 0x8000, np.uint16)).save(buffer, "PNG")
    image = decode_rgb(buffer.getvalue())
    assert image.dtype == torch.uint8
    assert set(image.unique().tolist()) == {128}


def test_damaged_images(encode_image):
    for data in (b"", b"no image", encode_image()[:-100], encode_image(24, 16, "PNG")[:60]):
        with pytest.raises(BadSampleError, match="image"):
            decode_rgb(data)


def test_pixel_limit():
    check_pixels(10_000, MAX_PIXELS // 10_000)
    with pytest.raises(BadSampleError, match="10000 x 10001 pixels, more than 100000000"):
        check_pixels(10_000, 10_001)
    with pytest.raises(BadSampleError, match="header"):
        check_pixels(0, 0)


def test_text():
    assert decode_text("\ufeff ein Füchslein \n".encode()) == "ein Füchslein"
    with pytest.raises(BadSampleError, match=r"not UTF-8 \(byte 3\)"):
        decode_text("caf\u00e9".encode("latin-1"))


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_damaged_bytes_never_kill_the_process(encode_image, format_):
    """Torchvision's PNG decoder crashes with a segmentation fault on some of these."""
    data = encode_image(24, 16, format_)
    rng = np.random.default_rng(0)
    bad = 0
    for _ in range(200):
        damaged = bytearray(data)
        for place in rng.integers(len(data), size=3):
            damaged[place] = rng.integers(256)
        try:
            decode_rgb(bytes(damaged))
        except BadSampleError:
            bad += 1
    assert bad > 0
    idat = bytearray(encode_image(24, 16, "PNG"))
    start = idat.find(b"IDAT")
    idat[start + 4 : start + 12] = b"\xff" * 8
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode_rgb(bytes(idat))


def test_utf_16_without_a_mark_is_no_caption():
    """Its ASCII letters with zeros between them are UTF-8 too."""
    assert decode_text(b"a hat") == "a hat"
    with pytest.raises(BadSampleError, match=r"not UTF-8 text \(byte 1 is zero"):
        decode_text("a hat".encode("utf-16-le"))
