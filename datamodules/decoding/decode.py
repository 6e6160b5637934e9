"""Decoding of images and text."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 100_000_000
"""Maximum size of an image; a larger one takes over 300 MB of memory, and a damaged header can state any size."""

_RGB = 3  # torchvision.io.ImageReadMode.RGB
_PNG = b"\x89PNG\r\n\x1a\n"
_WEBP_FLAGS, _WEBP_HAS_EXIF = 20, 0x08  # of its extended header


class BadSampleError(Exception):
    """A sample that cannot be used; the message is the reason."""


def check_pixels(width: int, height: int) -> None:
    """Refuse an image by the size in its header, before it is decoded.

    Raises:
        BadSampleError: If the size is unknown (0) or above ``MAX_PIXELS``.
    """
    if width * height == 0:
        raise BadSampleError("the image's header cannot be read")
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS}")


def decode_rgb(data: bytes, background: str | None = None) -> Tensor:
    """Decode a JPEG, PNG or WebP image and rotate it as its EXIF data requires.

    Args:
        data: The image's file.
        background: Color behind transparent parts, by a name or as ``#rrggbb``. Defaults to None: the colors that the file has
            there, which nobody sees.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadSampleError: If the bytes are not such an image.
    """
    upright = None if background is None else _read_with_pillow(data, if_transparent=True)
    if background is None or upright is None:
        return _decode_colors(data)
    front = Image.fromarray(_colors(upright).permute(1, 2, 0).contiguous().numpy())
    composite = Image.composite(front, Image.new("RGB", front.size, background), _opacity(upright))
    return torch.from_numpy(np.array(composite)).permute(2, 0, 1).contiguous()


def _decode_colors(data: bytes) -> Tensor:
    """The colors of an image, also of its transparent parts."""
    # Torchvision 0.29's PNG decoder kills the process on damaged data.
    if not data or data.startswith(_PNG) or _has_exif_in_webp(data):
        upright = _read_with_pillow(data)
        assert upright is not None
        return _colors(upright)
    import torchvision.io  # noqa: F401 registers the operator

    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        # torchvision.io.decode_image would call this too, but it warns each time that torchcodec will replace it, which is not
        # available on every platform.
        image: Tensor = torch.ops.image.decode_image(buffer, _RGB, True)
    except RuntimeError as error:
        raise BadSampleError(f"the image cannot be decoded ({_reason(error)})") from error
    if image.ndim != 3:
        raise BadSampleError("the image is an animation")
    return image


def decode_alpha(data: bytes) -> Tensor | None:
    """The alpha channel of an image, turned like :func:`decode_rgb` turns it; None if the image is opaque.

    Returns:
        uint8 (1, H, W).

    Raises:
        BadSampleError: If the bytes are not an image.
    """
    upright = _read_with_pillow(data, if_transparent=True)
    return None if upright is None else torch.from_numpy(np.array(_opacity(upright)))[None]


def has_transparency(data: bytes) -> bool:
    """Whether parts of an image are transparent, so that :func:`decode_rgb` gives colors there that nobody sees.

    Raises:
        BadSampleError: If the bytes are not an image.
    """
    alpha = decode_alpha(data)
    return alpha is not None and bool((alpha < 255).any())


def _reason(error: RuntimeError) -> str:
    """Torchvision's message, without the place in its source code."""
    return re.sub(r"^.*\.cpp:\d+\W*", "", str(error).splitlines()[0])


def _has_exif_in_webp(data: bytes) -> bool:
    """Whether an image is a WebP that says how it is turned, which torchvision does not read."""
    return data[8:16] == b"WEBPVP8X" and len(data) > _WEBP_FLAGS and bool(data[_WEBP_FLAGS] & _WEBP_HAS_EXIF)


def _read_with_pillow(data: bytes, if_transparent: bool = False) -> Image.Image | None:
    """Decode an image and turn it as its EXIF data requires; ``if_transparent`` gives None for opaque ones, by their header."""
    if not data:
        raise BadSampleError("the image is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_pixels decides
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if if_transparent and not image.has_transparency_data:
                return None
            # Not those of JPEG: cameras put previews and depth maps behind the photo.
            if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
                raise BadSampleError("the image is an animation")
            image.load()
            return ImageOps.exif_transpose(image)
    except BadSampleError:
        raise
    except Exception as error:  # Pillow's readers raise almost any exception on damaged bytes
        raise BadSampleError(f"the image cannot be decoded ({error})") from error


def _opacity(upright: Image.Image) -> Image.Image:
    return upright.convert("RGBA").getchannel("A")


def _colors(upright: Image.Image) -> Tensor:
    """The colors of an image that Pillow has decoded, uint8 (3, H, W)."""
    if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        grey = torch.from_numpy(np.asarray(upright).astype(np.int64))
        return ((grey * 255 + 32767) // 65535).to(torch.uint8).expand(3, -1, -1).contiguous()
    if upright.mode == "P":  # Pillow warns of palettes with transparency, although it finds the same colors
        upright = upright.convert("RGBA")
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous()


def decode_text(data: bytes) -> str:
    """The text of a ``.txt`` member, without surrounding white space.

    Raises:
        BadSampleError: If the bytes are not UTF-8, or hold zeros, as UTF-16 without a byte order mark does.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError(f"the caption is not UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise BadSampleError(f"the caption is not UTF-8 text (byte {data.index(0)} is zero, as in UTF-16)")
    return text
