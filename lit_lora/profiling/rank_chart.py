"""Draws the ranks of an adapter's layers as a chart."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 1120, 430, 60, 90, 20
_MAX_HEIGHT = 2400
_INK, _FIRST, _NOW = "#222222", "#DDDDDD", "#0072B2"
_LABEL = 15
"""Least distance of two labels in pixels."""


def rank_chart(ranks: Mapping[str, tuple[int, int]], title: str) -> Image.Image:
    """Draw a chart with one bar for each layer, in the order given.

    Args:
        ranks: For each layer the rank now and the rank at the start of training.
        title: Title of the chart.
    """
    row = max(2, min(18, (_MAX_HEIGHT - _TOP - _BOTTOM) // max(1, len(ranks))))
    image = Image.new("RGB", (_WIDTH, _TOP + row * len(ranks) + _BOTTOM), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    draw.text((20, 14), title, _INK, ImageFont.load_default(20))
    for x, color, text in ((20, _NOW, "now"), (100, _FIRST, "at the start")):
        draw.rectangle((x, 52, x + 14, 66), color)
        draw.text((x + 20, 59), text, _INK, font, anchor="lm")
    most = max((first for _, first in ranks.values()), default=1)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    gap = 1 if row > 3 else 0
    labelled = -_LABEL
    for number, (name, (now, first)) in enumerate(ranks.items()):
        y = _TOP + number * row
        draw.rectangle((_LEFT, y, _LEFT + first * scale, y + row - 1 - gap), _FIRST)
        draw.rectangle((_LEFT, y, _LEFT + now * scale, y + row - 1 - gap), _NOW)
        if y - labelled >= _LABEL:
            labelled = y
            draw.text((_LEFT - 8, y + row / 2), _fitting(draw, name, font), _INK, font, anchor="rm")
            draw.text((_LEFT + first * scale + 6, y + row / 2), str(now), _INK, font, anchor="lm")
    return image


def _fitting(draw: ImageDraw.ImageDraw, name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The end of a name that fits beside the chart."""
    if draw.textlength(name, font) <= _LEFT - 20:
        return name
    while draw.textlength(f"…{name}", font) > _LEFT - 20:
        name = name[1:]
    return f"…{name}"
