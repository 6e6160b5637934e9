"""What the commands of ``lit-lora adapter`` show on a screen of 80 columns."""

from __future__ import annotations

from pathlib import Path

from lit_lora.adapter_tools.resize import Resized
from lit_lora.report_text import format_table
from lit_lora.visible import visible

_NAME_WIDTH = 48


def layer_name(name: str) -> str:
    """The name of a layer, shortened in the middle so that a table has room for numbers."""
    return visible(name, _NAME_WIDTH)


def share(value: float) -> str:
    """A share in percent; 100 % only for all of it."""
    return f"{100 * min(value, 0.9999):.2f} %" if value < 1 - 1e-9 else "100 %"


def resized_lines(resized: Resized, target: Path) -> list[str]:
    """A table of a resized adapter's layers, and where it was written."""
    rows = [("layer", "rank", "kept")]
    for name, one in resized.layers.items():
        rank = str(one.before) if one.before == one.after else f"{one.before} → {one.after}"
        rows.append((layer_name(name), rank, share(one.kept)))
    before, after = (sum(getattr(one, when) for one in resized.layers.values()) for when in ("before", "after"))
    rows.append((f"{len(resized.layers)} layers", f"{before} → {after}", share(resized.kept)))
    return [*format_table(rows), "", f"written  {visible(target)}"]
