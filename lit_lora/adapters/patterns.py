"""Patterns that name layers, for the ``rank_pattern`` and ``alpha_pattern`` of PEFT's configs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from peft.utils.other import get_pattern_key

MOST_PATTERNS = 256
"""Number of patterns up to which each layer has its own. PEFT compares every layer with every pattern, and Python keeps 512
compiled ones: with 730 patterns for 788 layers PEFT took 23 s to load an adapter, with one pattern per rank 3 s."""

V = TypeVar("V", int, float)


def layer_patterns(values: Mapping[str, V]) -> dict[str, V]:
    """Patterns that give each layer its value.

    Args:
        values: Values of all adapted layers, by name.
    """
    if len(values) > MOST_PATTERNS:
        return grouped_patterns(values)
    keys = _pattern_keys(values)
    return {keys[name]: value for name, value in values.items()}


def grouped_patterns(values: Mapping[str, V]) -> dict[str, V]:
    """One pattern for all layers of a value.

    Args:
        values: Values by layer.
    """
    groups: dict[V, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return {f"^(?:{'|'.join(map(re.escape, names))})": value for value, names in sorted(groups.items())}


def pattern_value(patterns: Mapping[str, V], layer: str, default: Any) -> Any:
    """The value that patterns give to a layer, as PEFT reads them; the default if none matches."""
    return patterns.get(get_pattern_key(list(patterns), layer), default)


def _pattern_keys(names: Iterable[str]) -> dict[str, str]:
    """A pattern for each layer that matches this layer alone.

    PEFT takes the first pattern that matches the end of a layer's name. A name that other names end with gets a ``^``.
    """
    names = list(names)
    return {name: f"^{name}" if any(other.endswith(f".{name}") for other in names) else name for name in names}
