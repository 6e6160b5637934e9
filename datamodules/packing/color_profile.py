"""Color profiles in images."""

from __future__ import annotations

import io
from functools import lru_cache

from PIL import Image, ImageCms

_COLORANTS = ("red_colorant", "green_colorant", "blue_colorant")
_NEAR = 0.01
"""Difference of XYZ values up to which two colors are the same: profiles of sRGB differ by 0.001, and P3's from them by 0.08."""


def has_other_colors(image: bytes) -> bool:
    """Whether an image has a color profile that is not sRGB's, as photographs of many telephones and all prints have.

    Profiles of gray images, and those that cannot be read, do not count.

    Args:
        image: A JPEG, PNG or WebP file that Pillow can open.
    """
    with Image.open(io.BytesIO(image)) as opened:
        profile = opened.info.get("icc_profile")
    return bool(profile) and _is_other(profile)


@lru_cache(maxsize=64)  # images of one camera have the same profile, of up to a megabyte
def _is_other(content: bytes) -> bool:
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(content)).profile
    except (OSError, ImageCms.PyCMSError):
        return False
    if found.xcolor_space.strip() != "RGB":
        return found.xcolor_space.strip() != "GRAY"
    standard = ImageCms.createProfile("sRGB")
    for name in _COLORANTS:
        here, there = getattr(found, name), getattr(standard, name)
        if here is None:  # colors by a table: its name has to do
            return "srgb" not in str(found.profile_description).lower()
        if any(abs(one - other) > _NEAR for one, other in zip(here[0], there[0], strict=True)):
            return True
    return False
