"""What the commands of ``lit-lora adapter`` show on a screen of 80 columns or more."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lit_lora.adapter_tools.extract import Extracted
from lit_lora.adapter_tools.named_adapter import NamedAdapter
from lit_lora.adapter_tools.resize import Resized
from lit_lora.formats import AdapterFiles
from lit_lora.formats.lora import layers_of
from lit_lora.report_text import format_table
from lit_lora.visible import visible

_NAME_WIDTH = 48
_NUMBERS_WIDTH = 32
_MOST_LISTED = 10
_START = 16
"""Characters of a shortened name before the gap: they tell the blocks of a UNet, and its end tells the layer."""


def layer_name(name: str) -> str:
    """The name of a layer, shortened in the middle so that a table has room for numbers."""
    shown = visible(name)
    width = max(_NAME_WIDTH, shutil.get_terminal_size().columns - _NUMBERS_WIDTH)
    return shown if len(shown) <= width else f"{shown[:_START]}…{shown[_START + 1 - width :]}"


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


def merged_lines(sources: Sequence[NamedAdapter], merged: AdapterFiles, target: Path) -> list[str]:
    """A table of merged adapters, and where the result was written."""
    rows = [("adapter", "weight", "layers", "ranks")]
    for one in sources:
        rows.append((visible(one.path, _NAME_WIDTH), f"{one.weight:g}", *_layers_and_ranks(one.adapter)))
    rows.append(("merged", "", *_layers_and_ranks(merged)))
    return [*format_table(rows), "", f"written  {visible(target)}"]


def extracted_lines(extracted: Extracted, target: Path) -> list[str]:
    """A table of an extracted adapter's layers, what it lacks, and where it was written."""
    rows = [("layer", "rank", "error")]
    rows += [(layer_name(name), str(extracted.ranks[name]), share(error)) for name, error in extracted.errors.items()]
    lines = [*format_table(rows), ""]
    if extracted.unchanged:
        lines.append(f"{extracted.unchanged} layers are equal in both models")
    if extracted.left_out:
        lines.append(
            f"{len(extracted.left_out)} changed weights are not in the adapter, which can hold only layers' matrices:"
        )
        lines += [f"  {visible(name, 78)}" for name in extracted.left_out[:_MOST_LISTED]]
        if len(extracted.left_out) > _MOST_LISTED:
            lines.append(f"  and {len(extracted.left_out) - _MOST_LISTED} more")
    lines += [f"{name} is not in the adapter: {told}" for name, told in extracted.other_parts.items()]
    return [*lines, f"written  {visible(target)}"]


def _layers_and_ranks(adapter: AdapterFiles) -> tuple[str, str]:
    ranks: Counter[int] = Counter()
    for part in adapter.parts.values():
        ranks.update(len(one["lora_A.weight"]) for one in layers_of(part.state, "").values())
    return str(ranks.total()), span(ranks)


def span(ranks: Counter[int]) -> str:
    """The ranks that occur: one number, or the lowest and the highest."""
    lowest, highest = min(ranks), max(ranks)
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"
