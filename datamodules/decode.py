"""From the bytes of a sample to pixels and text."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch import Tensor

MAX_PIXELS = 100_000_000
"""Larger images are refused: they cost 300 MB and more for one sample, and a few bytes can claim any size."""


class BadSampleError(Exception):
    """A sample that cannot be used; the message says why."""


def check_pixels(width: int, height: int) -> None:
    """Refuse an image by the size in its header, before it is decoded.

    Raises:
        BadSampleError: The size is unknown (0) or above ``MAX_PIXELS``.
    """
    if width * height == 0:
        raise BadSampleError("the image's header cannot be read")
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS}")


def decode_rgb(data: bytes) -> Tensor:
    """Decode a JPEG, PNG or WebP image, turned upright by its EXIF data.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadSampleError: The bytes are no such image.
    """
    from torchvision.io import decode_image
    from torchvision.transforms.v2.functional import to_dtype

    if not data:
        raise BadSampleError("the image is empty")
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            # Its successor, torchcodec, is not on every platform that torchvision is on.
            warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
            image: Tensor = decode_image(buffer, mode="RGB", apply_exif_orientation=True)
    except RuntimeError as error:
        raise BadSampleError(f"the image cannot be decoded ({str(error).splitlines()[0]})") from error
    if image.dtype != torch.uint8:  # a PNG of 16 bits
        image = to_dtype(image, torch.uint8, scale=True)
    return image


def decode_text(data: bytes) -> str:
    """The caption in a ``.txt`` member, without white space around it.

    Raises:
        BadSampleError: It is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError(f"the caption is not UTF-8 (byte {error.start})") from error


def decode_json(data: bytes, key: str) -> str:
    """The caption under ``key`` in a ``.json`` member, without white space around it.

    Raises:
        BadSampleError: It is not JSON, or has no text under that key.
    """
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"the .json member is not valid ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise BadSampleError(f"the .json member has no text under the key {key!r}")
    caption: str = value[key]
    return caption.strip()
