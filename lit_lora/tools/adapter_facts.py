"""What an adapter is, as text and as JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lit_lora.adapter_tools.describe import AdapterFacts, LayerFacts
from lit_lora.byte_sizes import format_bytes
from lit_lora.tools.adapter_screen import by_kind, layer_table, span
from lit_lora.visible import visible

_WIDTH = 80
_MARGIN = " " * 12
_PATHS = ("file", "base")
"""Labels of what is copied whole."""
_MOST_CHARACTERS = 400
_MOST_VALUES, _WIDEST_NAME = 20, 60


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
    """The facts as text of 80 columns, and of more where the terminal has room for longer names of layers.

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
    lines = [*_aligned(list(values.items()))]
    if facts.layers:
        lines += ["", *layer_table(_HEAD, list(_rows(facts.layers, each_layer)))]
    if facts.metadata:
        lines += ["", "metadata", *_metadata(dict(sorted(facts.metadata.items())))]
    return lines


_HEAD = ("layers", "count", "rank", "alpha", "norm")


def _rows(layers: Sequence[LayerFacts], each_layer: bool) -> Iterator[tuple[str, ...]]:
    named = {one.name if one.part == "denoiser" else f"{one.part}.{one.name}": one for one in layers}
    kinds = by_kind(named, each_layer)
    for kind, names in kinds.items():
        found = [named[name] for name in names]
        yield (
            kind,
            str(len(found)),
            _span([one.rank for one in found]),
            _span([one.alpha for one in found]),
            _norm([one.norm for one in found]),
        )
    if len(kinds) > 1:
        ranks, alphas = [one.rank for one in layers], [one.alpha for one in layers]
        yield ("all", str(len(layers)), _span(ranks), _span(alphas), _norm([one.norm for one in layers]))


def _metadata(metadata: Mapping[str, str]) -> Iterator[str]:
    """The entries of the metadata; one that is a JSON object, as of settings or tags, has a line for each of its values."""
    parts = {key: _object(value) for key, value in metadata.items()}
    yield from _aligned(_shown({key: value for key, value in metadata.items() if not parts[key]}), "  ")
    for key, values in parts.items():
        if values:
            yield f"  {visible(key, _WIDEST_NAME)}"
            yield from _aligned(_shown(values)[:_MOST_VALUES], "    ")
            if len(values) > _MOST_VALUES:
                yield f"    and {len(values) - _MOST_VALUES} more"


def _object(text: str) -> dict[str, str]:
    """The values of a JSON object as texts; empty if the text is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}


def _shown(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names and values of a file as they can be shown, cut where they are very long."""
    return [(visible(name, _WIDEST_NAME), visible(value, _MOST_CHARACTERS)) for name, value in values.items()]


def _aligned(values: Sequence[tuple[str, str]], indent: str = "") -> Iterator[str]:
    """Names and values in two columns; a value that is too wide for its column begins on a line of its own."""
    width = max((len(name) for name, _ in values), default=0) + len(indent) + 2
    for name, value in values:
        if width + len(value) <= _WIDTH or name in _PATHS:
            yield ((indent + name).ljust(width) + value).rstrip()
        else:
            yield indent + name
            yield from textwrap.wrap(value, _WIDTH, initial_indent=_MARGIN, subsequent_indent=_MARGIN)


def _tokens(facts: AdapterFacts) -> str:
    """The new tokens, with their numbers of vectors where these are several."""
    names = (visible(name) + (f" ({count} vectors)" if count > 1 else "") for name, count in facts.new_tokens.items())
    return ", ".join(names)


def _span(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return span(known) if known else ""


def _norm(values: Sequence[float | None]) -> str:
    """The norm of several layers together."""
    known = [value for value in values if value is not None]
    return f"{math.hypot(*known):.4g}" if known else ""
