"""What an adapter is, as text and as JSON."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from lit_lora.adapter_tools.describe import AdapterFacts, LayerFacts
from lit_lora.byte_sizes import format_bytes
from lit_lora.report_text import format_table
from lit_lora.tools.adapter_screen import layer_name
from lit_lora.visible import visible

_WIDTH = 80
_LABEL = 12
_MOST_CHARACTERS = 400


def as_json(facts: AdapterFacts, path: Path, format_name: str, size: int) -> str:
    """All facts as a JSON object.

    Args:
        facts: The facts.
        path: Main file of the adapter's tensors.
        format_name: Name of its format.
        size: Size of all its files of tensors in bytes.
    """
    return json.dumps({"path": str(path), "format": format_name, "bytes": size, **asdict(facts)}, indent=2)


def as_lines(facts: AdapterFacts, path: Path, format_name: str, size: int, each_layer: bool) -> list[str]:
    """The facts as text of 80 columns.

    Args:
        facts: The facts.
        path: Main file of the adapter's tensors.
        format_name: Name of its format.
        size: Size of all its files of tensors in bytes.
        each_layer: Whether to list every layer instead of one line for all layers of a kind.
    """
    values = {
        "file": visible(path),
        "format": format_name,
        "method": facts.method,
        "family": facts.family or "not known",
        "base": visible(facts.base) if facts.base else "not told",
        "dtype": ", ".join(facts.dtypes),
        **({"new tokens": _tokens(facts)} if facts.new_tokens else {}),
        "parameters": f"{facts.parameters:,}",
        "size": format_bytes(size),
    }
    lines = [line for label, value in values.items() for line in _wrapped(label, value)]
    if facts.layers:
        lines += ["", *format_table([_HEAD, *_rows(facts.layers, each_layer)])]
    if facts.metadata:
        lines += ["", "metadata"]
        for key, value in sorted(facts.metadata.items()):
            lines += _wrapped(f"  {visible(key, 60)}", visible(value, _MOST_CHARACTERS))
    return lines


_HEAD = ("layers", "count", "rank", "alpha", "norm")


def _rows(layers: Sequence[LayerFacts], each_layer: bool) -> Iterator[tuple[str, ...]]:
    kinds: dict[str, list[LayerFacts]] = {}
    for one in layers:
        name = one.name if one.part == "denoiser" else f"{one.part}.{one.name}"
        # Blocks are numbered; other numbers, as in "to_out.0", tell layers of one block apart.
        kind = name if each_layer else re.sub(r"(?<=s\.)\d+(?=\.)|(?<=_blocks\.)\d+(?=\.)", "*", name)
        kinds.setdefault(kind, []).append(one)
    for kind, found in kinds.items():
        yield (
            layer_name(kind),
            str(len(found)),
            _span([one.rank for one in found]),
            _span([one.alpha for one in found]),
            _norm([one.norm for one in found]),
        )
    if len(kinds) > 1:
        ranks, alphas = [one.rank for one in layers], [one.alpha for one in layers]
        yield ("all", str(len(layers)), _span(ranks), _span(alphas), _norm([one.norm for one in layers]))


def _tokens(facts: AdapterFacts) -> str:
    """The new tokens, with their numbers of vectors where these are several."""
    names = (visible(name) + (f" ({count} vectors)" if count > 1 else "") for name, count in facts.new_tokens.items())
    return ", ".join(names)


def _span(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    lowest, highest = min(known), max(known)
    return f"{lowest:g}" if lowest == highest else f"{lowest:g}-{highest:g}"


def _norm(values: Sequence[float | None]) -> str:
    """The norm of several layers together."""
    known = [value for value in values if value is not None]
    return f"{math.hypot(*known):.4g}" if known else ""


def _wrapped(label: str, value: str) -> list[str]:
    if label in ("file", "base"):  # a path is copied whole
        return [label.ljust(_LABEL) + value]
    if len(label) >= _LABEL:
        return [label, *textwrap.wrap(value, _WIDTH, initial_indent=" " * _LABEL, subsequent_indent=" " * _LABEL)]
    return textwrap.wrap(value, _WIDTH, initial_indent=label.ljust(_LABEL), subsequent_indent=" " * _LABEL) or [label]
