"""Detection of image formats."""

from __future__ import annotations

_BEGINNINGS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}


def image_format(data: bytes) -> str:
    """The format of an image by its first bytes: ``jpg``, ``png`` or ``webp``; empty for other data."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for beginning, name in _BEGINNINGS.items() if data.startswith(beginning)), "")
