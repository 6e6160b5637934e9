"""An adapter with its place and its weight."""

from __future__ import annotations

from dataclasses import dataclass

from lit_lora.formats import AdapterFiles


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter to merge.

    Args:
        path: Where it was read from, for errors.
        adapter: The adapter.
        weight: Factor of its update; defaults to 1.
    """

    path: str
    adapter: AdapterFiles
    weight: float = 1.0
