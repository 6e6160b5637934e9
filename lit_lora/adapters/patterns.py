"""Patterns that name one layer, for the ``rank_pattern`` and ``alpha_pattern`` of PEFT's configs."""

from __future__ import annotations

from collections.abc import Iterable


def pattern_keys(names: Iterable[str]) -> dict[str, str]:
    """A pattern for each layer that matches this layer alone.

    PEFT takes the first pattern that matches the end of a layer's name. A name that other names end with gets a ``^``.

    Args:
        names: Names of all adapted layers.
    """
    names = list(names)
    return {name: f"^{name}" if any(other.endswith(f".{name}") for other in names) else name for name in names}
