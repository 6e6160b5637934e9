"""What the commands of ``lit-lora adapter`` show on a screen of 80 columns or more."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lit_lora.adapter_tools.extract import Extracted
from lit_lora.adapter_tools.named_adapter import NamedAdapter
from lit_lora.adapter_tools.resize import Resized, kept_share
from lit_lora.formats import AdapterFiles
from lit_lora.formats.lora import layers_of
from lit_lora.report_text import format_table
from lit_lora.visible import visible

_WIDTH = 80
_PATH_WIDTH = 48
_MOST_LISTED = 10
_START = 16
"""Characters of a shortened name before the gap: they tell the blocks of a UNet, and its end tells the layer."""


_BLOCK = re.compile(r"(?<=s\.)\d+(?=\.)")
"""Number of a block; other numbers, as in ``to_out.0``, tell layers of one block apart."""


def by_kind(names: Iterable[str], each: bool = False) -> dict[str, list[str]]:
    """Names of layers by kind, which is the name with a star for the numbers of blocks, or by themselves if ``each`` is true."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name if each else _BLOCK.sub("*", name), []).append(name)
    return kinds


def layer_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of layers; names are shortened in the middle so that it fits into 80 columns, or into the terminal.

    Args:
        head: Names of the columns.
        rows: For each line the name of a layer or of a kind, and its numbers.
    """
    numbers = sum(2 + max(map(len, column)) for column in list(zip(head, *rows, strict=True))[1:])
    width = max(_WIDTH, shutil.get_terminal_size().columns) - numbers
    return format_table([head, *((_shortened(visible(name), width), *others) for name, *others in rows)])


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[:_START]}…{name[_START + 1 - width :]}"


def share(value: float) -> str:
    """A share in percent; 100 % only for all of it."""
    return f"{100 * min(value, 0.9999):.2f} %" if value < 1 - 1e-9 else "100 %"


def resized_lines(resized: Resized, target: Path, each_layer: bool = False) -> list[str]:
    """A table of a resized adapter's layers, and where it was written.

    Args:
        resized: The adapter.
        target: Where it was written.
        each_layer: Whether to list every layer instead of one line for all layers of a kind; off by default.
    """
    rows = []
    for kind, names in by_kind(resized.layers, each_layer).items():
        found = [resized.layers[name] for name in names]
        ranks = both_ranks([(one.before, one.after) for one in found], " → ")
        rows.append((kind, str(len(names)), ranks, share(kept_share(found))))
    total, left = (sum(getattr(one, when) for one in resized.layers.values()) for when in ("before", "after"))
    rows.append(("all, and the sum of ranks", str(len(resized.layers)), f"{total} → {left}", share(resized.kept)))
    return [*layer_table(("layers", "count", "rank", "kept"), rows), "", f"written  {visible(target)}"]


def merged_lines(sources: Sequence[NamedAdapter], merged: AdapterFiles, target: Path) -> list[str]:
    """A table of merged adapters, and where the result was written."""
    rows = [("adapter", "weight", "layers", "ranks")]
    for one in sources:
        rows.append((visible(one.path, _PATH_WIDTH), f"{one.weight:g}", *_layers_and_ranks(one.adapter)))
    rows.append(("merged", "", *_layers_and_ranks(merged)))
    return [*format_table(rows), "", f"written  {visible(target)}"]


def extracted_lines(extracted: Extracted, target: Path, each_layer: bool = False) -> list[str]:
    """A table of an extracted adapter's layers, what it lacks, and where it was written.

    Args:
        extracted: The adapter.
        target: Where it was written.
        each_layer: Whether to list every layer instead of one line for all layers of a kind, with the largest of their errors;
            off by default.
    """
    rows = []
    for kind, names in by_kind(extracted.errors, each_layer).items():
        ranks = span(extracted.ranks[name] for name in names)
        rows.append((kind, str(len(names)), ranks, share(max(extracted.errors[name] for name in names))))
    error = "error" if each_layer else "largest error"
    lines = [*layer_table(("layers", "count", "rank", error), rows), ""]
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
    return str(ranks.total()), span(ranks, " to ")


def both_ranks(pairs: Sequence[tuple[int, int]], between: str) -> str:
    """The first and the second ranks of layers; the first alone if no layer has another second one."""
    first, second = (span(ranks) for ranks in zip(*pairs, strict=True))
    return first if all(one == other for one, other in pairs) else f"{first}{between}{second}"


def span(values: Iterable[float], between: str = "-") -> str:
    """The values that occur: one number, or the lowest and the highest."""
    found = set(values)
    lowest, highest = min(found), max(found)
    return f"{lowest:g}" if lowest == highest else f"{lowest:g}{between}{highest:g}"
