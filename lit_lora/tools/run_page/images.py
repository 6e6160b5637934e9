"""Images inside of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

_MOST_BYTES = 200_000
_EDGE = 1024
_SMALL = 320
"""Widths below which an image is enlarged without blur."""


def image_tag(path: Path, text: str) -> str:
    """An ``img`` element that holds the image itself: as it is, or if that is large, as a JPEG of at most 1024 pixels.

    Args:
        path: File of the image.
        text: Alternative text, escaped.

    Raises:
        OSError: If the file is no image that can be read.
    """
    with Image.open(path) as image:
        image.load()
        width, height = image.size
        data, kind = path.read_bytes(), (image.format or "PNG").lower()
        if len(data) > _MOST_BYTES:
            shown = image.convert("RGB")
            shown.thumbnail((_EDGE, _EDGE))
            buffer = io.BytesIO()
            shown.save(buffer, "JPEG", quality=85)
            data, kind = buffer.getvalue(), "jpeg"
            width, height = shown.size
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    small = ' class="small"' if width < _SMALL else ""
    return f'<img{small} src="{source}" width="{width}" height="{height}" alt="{text}">'
