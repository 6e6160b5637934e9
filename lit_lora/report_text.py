"""Formatting of tables, durations and summaries."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence

from lit_lora.byte_sizes import format_bytes


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def format_note(note: str) -> str:
    """A note of a summary, in lines of at most 80 columns, unless a path is longer."""
    return textwrap.fill(
        note,
        80,
        initial_indent="note     ",
        subsequent_indent=" " * 9,
        break_long_words=False,
        break_on_hyphens=False,
    )


def format_reason(line: str, indent: int = 5) -> str:
    """A line about files or a run, in lines of at most 80 columns, unless a path is longer.

    Args:
        line: The line.
        indent: Number of spaces before the lines after the first; defaults to 5.
    """
    return textwrap.fill(line, 80, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def format_option(name: str, value: str) -> str:
    """An option as words of a command line that a shell takes as they are, where a value may begin like an option."""
    return f"--{name}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"


def format_next(*words: str) -> str:
    """The next command of use, which a shell takes as it is: a line for its beginning, and one for each further option.

    Args:
        *words: Name of the command, then its options, each with its values as one shell-quoted text.
    """
    return "\n".join(["", "Next:", " \\\n  ".join(words)])


def format_written(shards: int, resumed: int, samples: int, size: int, left_out: int, reports: str) -> str:
    """A summary of written shards, in four lines.

    Args:
        shards: Number of shards.
        resumed: Number of shards that an earlier run had written.
        samples: Number of samples.
        size: Size of the shards in bytes.
        left_out: Number of bad samples that were left out.
        reports: File that describes the bad samples.
    """
    lines = [
        f"shards   {shards:,} ({resumed:,} of them from an earlier run)",
        f"samples  {samples:,}",
        f"size     {format_bytes(size)}",
        f"left out {left_out:,}" + (f" (see {reports})" if left_out else ""),
    ]
    return "\n".join(lines)


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: ``2 d 3 h``, ``12 min 5 s``, ``0.8 s``, ``4 ms``."""
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(place for place, (amount, _) in enumerate(units) if amount)
    return " ".join(f"{amount} {unit}" for amount, unit in units[first : first + 2])
