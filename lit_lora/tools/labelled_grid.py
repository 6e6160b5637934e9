"""A grid of images with names of its rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER = "#222222", "#ffffff"
_GAP, _LEAST, _LINE = 8, 128, 18
"""Pixels between cells, least width of a cell, and height of a line of text."""
_MOST_LINES = 8


def labelled_grid(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], names: Sequence[str]) -> Image.Image:
    """Draw a table of images, with a line above each column and beside each row.

    Args:
        rows: Images of each row, one for each column.
        columns: Names of the columns.
        names: Names of the rows.
    """
    width = max(_LEAST, *(image.width for row in rows for image in row))
    font = ImageFont.load_default(14)
    heads = [_wrapped(name, width, font) for name in columns]
    sides = [_wrapped(name, max(_LEAST, min(width, 240)), font) for name in names]
    left = max(_LEAST, min(width, 240)) + 2 * _GAP
    top = max(map(len, heads)) * _LINE + 2 * _GAP
    heights = [
        max(len(side) * _LINE, *(image.height for image in row)) + _GAP for side, row in zip(sides, rows, strict=True)
    ]
    sheet = Image.new("RGB", (left + len(columns) * (width + _GAP), top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, head in enumerate(heads):
        draw.multiline_text((left + number * (width + _GAP), _GAP), "\n".join(head), _INK, font, spacing=_LINE - 14)
    y = top
    for side, row, height in zip(sides, rows, heights, strict=True):
        draw.multiline_text((_GAP, y), "\n".join(side), _INK, font, spacing=_LINE - 14)
        for number, image in enumerate(row):
            sheet.paste(image, (left + number * (width + _GAP), y))
        y += height
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of a text that are not wider than this; long words are broken."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "…"]
