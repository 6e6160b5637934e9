"""Differences of two adapters, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from lit_lora.adapter_tools.compare import Comparison, Distance, together
from lit_lora.tools.adapter_screen import both_ranks, by_kind, layer_table
from lit_lora.visible import visible

_MOST_LISTED = 10
_VALUE_WIDTH = 74
_ROUNDING = 1e-9
"""Below it a distance is that of rounding: the updates are computed in float64."""


def as_json(found: Comparison) -> str:
    """The differences as a JSON object; null for what is not a number."""

    def row(one: Distance) -> dict[str, Any]:
        numbers = {"first": one.first, "second": one.second, "distance": one.relative, "cosine": one.cosine}
        return {"ranks": one.ranks} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    return json.dumps(
        {
            "config": found.config,
            "only_first": found.only_first,
            "only_second": found.only_second,
            "layers": {name: row(one) for name, one in found.layers.items()},
            "total": row(found.total),
        },
        indent=2,
    )


def as_lines(found: Comparison, each_layer: bool = False) -> list[str]:
    """The differences as text of 80 columns.

    Args:
        found: The differences.
        each_layer: Whether to list every layer instead of one line for all layers of a kind; off by default.
    """
    lines: list[str] = []
    for entry, values in found.config.items():
        lines += [
            visible(entry, _VALUE_WIDTH),
            *(f"  {which} {visible(repr(value), 70)}" for which, value in zip("12", values, strict=True)),
        ]
    for which, names in (("first", found.only_first), ("second", found.only_second)):
        lines += _only(which, names)
    equal = all(one.relative < _ROUNDING for one in found.layers.values())
    if equal and found.layers and not lines and not each_layer:
        return [f"the adapters are equal: {len(found.layers)} layers"]
    if lines:
        lines.append("")
    rows = []
    for kind, names in by_kind(found.layers, each_layer).items():
        distances = [found.layers[name] for name in names]
        rows.append((kind, str(len(names)), _ranks(distances), *_numbers(together(distances))))
    if found.layers:
        rows.append(("all", str(len(found.layers)), "", *_numbers(found.total)))
    return [*lines, *layer_table(("layers", "count", "ranks", "distance", "cosine"), rows)]


def _only(which: str, names: list[str]) -> Iterator[str]:
    if names:
        yield f"{len(names)} only in the {which} adapter"
        yield from (f"  {visible(name, 78)}" for name in names[:_MOST_LISTED])
    if len(names) > _MOST_LISTED:
        yield f"  and {len(names) - _MOST_LISTED} more"


def _ranks(distances: Sequence[Distance]) -> str:
    """The ranks of layers in both adapters."""
    pairs = [one.ranks for one in distances if one.ranks is not None]
    return both_ranks(pairs, " | ") if pairs else ""


def _numbers(one: Distance) -> tuple[str, str]:
    return f"{one.relative:.4f}", "" if math.isnan(one.cosine) else f"{one.cosine:.4f}"
