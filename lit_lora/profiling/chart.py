"""Draws memory by phase and kind as a chart."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from lit_lora.profiling.kinds import KINDS

KIND_COLORS = dict(zip(KINDS, ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#BBBBBB"), strict=True))
"""Okabe and Ito's colors, which color-blind people can tell apart, by kind of memory."""
_WIDTH, _LEFT, _RIGHT, _TOP, _BAR, _GAP, _BOTTOM = 1000, 150, 130, 110, 30, 16, 60
_INK, _GRID = "#222222", "#DDDDDD"


def memory_chart(phases: Mapping[str, Mapping[str, int]], title: str) -> Image.Image:
    """Draw a chart with one bar per phase, stacked from its kinds of memory.

    Args:
        phases: Bytes of each phase, by kind: see :data:`~lit_lora.profiling.kinds.KINDS`.
        title: Title of the chart.
    """
    text, small = ImageFont.load_default(16), ImageFont.load_default(14)
    height = _TOP + len(phases) * (_BAR + _GAP) + _BOTTOM
    image = Image.new("RGB", (_WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_LEFT, 16), title, _INK, ImageFont.load_default(20))
    _draw_legend(draw, small)
    total = max((sum(kinds.values()) for kinds in phases.values()), default=0)
    unit, name = (2**30, "GiB") if total >= 2**30 else (2**20, "MiB")
    step = round_step(max(total, 1) / unit / 5)
    pixels = (_WIDTH - _LEFT - _RIGHT) / (max(total, 1) / unit)
    floor = height - _BOTTOM + 4
    for tick in range(int(total / unit / step) + 1):
        x = _LEFT + tick * step * pixels
        draw.line((x, _TOP - 8, x, floor), _GRID)
        draw.text((x, floor + 4), f"{tick * step:g}", _INK, small, anchor="mt")
    draw.text((_WIDTH - _RIGHT + 10, floor + 4), name, _INK, small, anchor="lt")
    for row, (phase, kinds) in enumerate(phases.items()):
        y = _TOP + row * (_BAR + _GAP)
        x = float(_LEFT)
        draw.text((_LEFT - 10, y + _BAR / 2), phase[:18], _INK, text, anchor="rm")
        for kind in KINDS:
            width = kinds[kind] / unit * pixels
            if width >= 0.5:
                draw.rectangle((x, y, x + width, y + _BAR), KIND_COLORS[kind])
            x += width
        draw.text((x + 8, y + _BAR / 2), f"{sum(kinds.values()) / unit:.4g} {name}", _INK, text, anchor="lm")
    draw.line((_LEFT, _TOP - 8, _LEFT, floor), _INK)
    return image


def _draw_legend(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
    x = float(_LEFT)
    for kind in KINDS:
        draw.rectangle((x, 58, x + 14, 72), KIND_COLORS[kind])
        draw.text((x + 20, 65), kind, _INK, font, anchor="lm")
        x += 20 + draw.textlength(kind, font) + 22


def round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least ``least``."""
    power = 10.0**-6
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10
