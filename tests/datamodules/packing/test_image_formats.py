from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image, features

from lit_lora.datamodules.decoding.decode import BadSampleError, decode_rgb
from lit_lora.datamodules.packing.image_formats import image_extension, to_shard_format

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def _encode(image_format, image=None, **options):
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("extension", "image_format"),
    [
        ("bmp", "BMP"),
        ("tif", "TIFF"),
        ("tiff", "TIFF"),
        ("tga", "TGA"),
        ("ppm", "PPM"),
        ("jp2", "JPEG2000"),
        ("pcx", "PCX"),
        ("qoi", "QOI"),
        ("sgi", "SGI"),
    ],
)
def test_lossless_formats_become_the_same_pixels(extension, image_format):
    name, data = to_shard_format(extension, _encode(image_format))
    assert name == "png"
    assert np.array_equal(decode_rgb(data).permute(1, 2, 0).numpy(), PIXELS)
    assert to_shard_format(extension, _encode(image_format)) == (name, data)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_all_modes_of_png_are_kept(mode):
    image = (
        Image.fromarray(PIXELS).convert("L").convert("I;16")
        if mode == "I;16"
        else Image.fromarray(PIXELS).convert(mode)
    )
    found = Image.open(io.BytesIO(to_shard_format("tif", _encode("TIFF", image))[1]))
    assert np.array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif_becomes_what_pillow_decodes():
    data = _encode("AVIF")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_rgb(to_shard_format("avif", data)[1]).permute(1, 2, 0).numpy(), expected)


def test_gif_with_one_frame(tmp_path):
    data = _encode("GIF")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_rgb(to_shard_format("gif", data)[1]).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("extension", "image_format", "name"),
    [("jfif", "JPEG", "jpg"), ("jpe", "JPEG", "jpg"), ("jpeg", "JPEG", "jpeg"), ("apng", "PNG", "png"), ("bmp", "JPEG", "jpg"),
     ("webp", "WEBP", "webp"), ("image", "PNG", "png")],
)  # fmt: skip
def test_formats_of_shards_keep_their_bytes(extension, image_format, name):
    data = _encode(image_format)
    assert to_shard_format(extension, data) == (name, data)


@pytest.mark.parametrize("image_format", ["GIF", "TIFF"])
def test_frames_and_pages_are_refused(image_format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    data = _encode(image_format, frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(BadSampleError, match="the image has 3 frames or pages; save the one to train on as PNG"):
        to_shard_format("x", data)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_rgb(to_shard_format("tif", _encode("TIFF", exif=exif))[1])
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.rot90(PIXELS, -1))


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_rotation_of_avif_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(to_shard_format("avif", _encode("AVIF", exif=exif))[1]).shape == (3, 24, 16)


def test_cmyk_becomes_rgb():
    image = Image.fromarray(PIXELS).convert("CMYK")
    image.info["icc_profile"] = b"of CMYK"
    found = Image.open(io.BytesIO(to_shard_format("tif", _encode("TIFF", image))[1]))
    assert found.mode == "RGB"
    assert "icc_profile" not in found.info


@pytest.mark.parametrize(
    ("extension", "data", "reason"),
    [
        ("bmp", b"", "the image is empty"),
        ("jpg", b"no image", "the image's header cannot be read"),
        ("jfif", b"no image", "the image's header cannot be read"),
        ("jxl", b"\xff\x0a nothing", r"is not one of the image formats jpg, .*; convert it to PNG or JPEG"),
        ("svg", b"<svg/>", "is not one of the image formats"),
        ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not one of the image formats"),
        ("tif", _encode("TIFF")[:300], "the image cannot be decoded|is not one of"),
        ("bmp", _encode("BMP")[:-200], "the image cannot be decoded"),
        ("tif", _encode("TIFF", Image.new("F", (4, 4))), "color mode F, which PNG lacks; convert it to RGB"),
        ("bmp", _encode("BMP", Image.new("1", (20_000, 5_001))), "20000 x 5001 pixels, more than 100000000"),
    ],
)
def test_what_cannot_be_packed_has_a_reason(extension, data, reason):
    with pytest.raises(BadSampleError, match=reason):
        to_shard_format(extension, data)


def test_heic_names_the_package_that_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(BadSampleError, match="pip install pillow-heif, or convert the image to JPEG or PNG"):
        to_shard_format("heic", b"\0\0\0\x18ftypheic" + bytes(100))


def test_heic_is_packed_with_that_package():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    data = _encode("HEIF", quality=-1)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_rgb(to_shard_format("heic", data)[1]).permute(1, 2, 0).numpy(), expected)


def test_extensions_in_upper_case():
    assert image_extension("a/B.TIFF") == "tiff"
    assert image_extension("a.JPE") == "jpe"
    assert image_extension("a.txt") == image_extension("jpg") == ""
