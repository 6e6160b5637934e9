"""Charts as SVG inside of a page, without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from lit_lora.byte_sizes import format_bytes
from lit_lora.profiling.chart import KIND_COLORS, round_step

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 260, 58, 14, 12, 34
_MOST_POINTS = 200
_BAR, _ROW = 18, 26


class Line(NamedTuple):
    """A line of a chart.

    Args:
        name: What it shows.
        points: Steps and values, by step.
        style: Class in the page's style sheet.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str


def line_chart(lines: Sequence[Line], level: tuple[str, float] | None = None) -> str:
    """A chart of values by step.

    Args:
        lines: Lines, of which at least one has a point; of long ones, each point is the mean of several.
        level: Name and height of a horizontal line; defaults to none.
    """
    thinned = [(line, _thinned(line.points)) for line in lines]
    points = [point for _, (shown, _) in thinned for point in shown]
    heights = [value for _, value in points] + ([level[1]] if level else [])
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high, tick = _range(min(heights), max(heights))

    def x(step: float) -> float:
        return _LEFT + (step - first) / max(last - first, 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for number in range(round((high - low) / tick) + 1):
        value = low + number * tick
        parts.append(f'<path class="rule" d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for step, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "start"),):
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 12}" text-anchor="{anchor}">step {step:,.0f}</text>')
    if level:
        parts.append(f'<path class="level" d="M{_LEFT} {y(level[1]):.1f}H{_WIDTH - _RIGHT}"/>')
    for line, (shown, _) in thinned:
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in shown)
        parts.append(f'<path class="line {line.style}" d="M{path}"/>')
        if len(shown) <= 40:
            parts += [_dot(x(step), y(value), f"step {step:,.0f}: {value:.6g}", line.style) for step, value in shown]
    names = [(_named(line, each), f"line {line.style}") for line, (_, each) in thinned]
    names += [(f"{level[0]}: {level[1]:.4g}", "level")] if level else []
    keys = "".join(
        f'<li><svg viewBox="0 0 20 8" width="20" height="8"><path class="{style}" d="M0 4H20"/></svg> {escape(name)}</li>'
        for name, style in names
        if len(names) > 1 or name != lines[0].name  # the heading names a line that is alone
    )
    label = escape(", ".join(name for name, _ in names), quote=True)
    svg = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<figure>{svg}<ul class="keys">{keys}</ul></figure>'


def stacked_bars(rows: Sequence[tuple[str, Mapping[str, int]]]) -> str:
    """Bars of memory, each made of its kinds.

    Args:
        rows: Name of each bar, and bytes by kind: see :data:`~lit_lora.profiling.kinds.KINDS`; or ``{"": bytes}`` for one that is
            not divided.
    """
    most = max((sum(kinds.values()) for _, kinds in rows), default=0) or 1
    left, right = 150, 84
    parts = []
    for number, (label, kinds) in enumerate(rows):
        top, at = number * _ROW, float(left)
        parts.append(f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{escape(label)}</text>')
        for kind, size in kinds.items():
            width = size / most * (_WIDTH - left - right)
            color = KIND_COLORS.get(kind, "#0072B2")
            told = escape(f"{label}, {kind or 'all kinds'}: {format_bytes(size)}")
            parts.append(
                f'<rect x="{at:.1f}" y="{top}" width="{width:.1f}" height="{_BAR}" fill="{color}"><title>{told}</title></rect>'
            )
            at += width
        parts.append(f'<text x="{at + 6:.1f}" y="{top + 14}">{format_bytes(sum(kinds.values()))}</text>')
    shown = [kind for kind in KIND_COLORS if any(kinds.get(kind) for _, kinds in rows)]
    keys = "".join(
        f'<li><svg width="12" height="12"><rect width="12" height="12" fill="{KIND_COLORS[kind]}"/></svg> {escape(kind)}</li>'
        for kind in shown
    )
    box = f"0 0 {_WIDTH} {len(rows) * _ROW}"
    svg = f'<svg class="chart" viewBox="{box}" role="img" aria-label="memory">{"".join(parts)}</svg>'
    return f'<figure>{svg}<ul class="keys">{keys}</ul></figure>'


def _named(line: Line, each: int) -> str:
    return line.name if each == 1 else f"{line.name} (each point is the mean of {each} values)"


def _dot(x: float, y: float, told: str, style: str) -> str:
    return f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(told)}</title></circle>'


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """At most so many points as a chart can show, and how many values each of them is the mean of."""
    each = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + each] for start in range(0, len(points), max(each, 1))]
    means = [(sum(step for step, _ in one) / len(one), sum(value for _, value in one) / len(one)) for one in groups]
    return means, each


def _range(low: float, high: float) -> tuple[float, float, float]:
    """Bounds of an axis that holds these values, and the distance of its ticks."""
    spread = (high - low) or abs(high) or 1.0
    tick = round_step(spread / 5) if spread / 5 >= 1e-6 else spread / 5
    bottom = tick * int(low // tick)
    top = tick * -int(-high // tick)
    return bottom, top if top > bottom else bottom + tick, tick
