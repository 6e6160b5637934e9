"""Images whose color profile is not sRGB's."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from lit_lora.datamodules.packing.color_profile import has_other_colors
from lit_lora.datamodules.packing.pack import pack_folder

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RED_OF_P3 = (0.5151, 0.2412, -0.0011)


def with_red(xyz: tuple[float, float, float]) -> bytes:
    """The profile of sRGB with another red; its name stays."""
    entry = SRGB.index(b"rXYZ")
    (offset,) = struct.unpack(">I", SRGB[entry + 4 : entry + 8])
    values = struct.pack(">3i", *(round(value * 65536) for value in xyz))
    return SRGB[: offset + 8] + values + SRGB[offset + 8 + len(values) :]


def file(kind: str, profile: bytes | None, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, kind, icc_profile=profile)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_colors_of_a_profile_decide(kind: str) -> None:
    assert not has_other_colors(file(kind, None))
    assert not has_other_colors(file(kind, SRGB))
    assert not has_other_colors(file(kind, with_red((0.4361, 0.2225, 0.0139))))
    assert has_other_colors(file(kind, with_red(RED_OF_P3)))


def test_profiles_of_gray_images_and_damaged_ones_do_not_count() -> None:
    space = SRGB.index(b"RGB ")
    gray, printed = (SRGB[:space] + name + SRGB[space + 4 :] for name in (b"GRAY", b"CMYK"))
    assert not has_other_colors(file("PNG", gray, "L"))
    assert has_other_colors(file("JPEG", printed, "CMYK"))
    assert not has_other_colors(file("PNG", b"no profile"))


def test_packing_tells_of_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, profile in (("a", SRGB), ("b", with_red(RED_OF_P3)), ("c", with_red(RED_OF_P3))):
        (tmp_path / "in" / f"{name}.jpg").write_bytes(file("JPEG", profile))
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    (note,) = pack_folder(tmp_path / "in", tmp_path / "out").notes
    assert note.startswith(
        "2 images with a color profile other than sRGB, first b.jpg: training takes their numbers for sRGB"
    )
