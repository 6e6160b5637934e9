"""Files and samples that packing leaves out, and how they are counted and shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lit_lora.files import atomic_file
from lit_lora.visible import visible

_MAX_REASONS = 12


@dataclass(frozen=True)
class BadFile:
    """A file or sample that is left out, and the reason.

    Attributes:
        file: Name of the file or sample, or of the first of several.
        reason: Description of the reason, and what to do.
        count: Number of files for which the entry stands. Defaults to 1.
    """

    file: str
    reason: str
    count: int = 1

    def inside(self, name: str) -> BadFile:
        """The same entry, as part of a file of this name."""
        return replace(self, file=f"{name}: {self.file}")


def count_files(files: Iterable[BadFile]) -> int:
    """Number of files for which the entries stand."""
    return sum(file.count for file in files)


def list_first(files: Sequence[BadFile], most: int = 10) -> str:
    """The first entries for an error message, one per line."""
    lines = [f"\n  {visible(file.file)}: {visible(file.reason)}" for file in files[:most]]
    return "".join(lines) + (f"\n  … and {len(files) - most:,} more" if len(files) > most else "")


def format_reasons(files: Iterable[BadFile]) -> list[str]:
    """Lines that give the number and the first name for each reason, the most frequent first."""
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    for file in files:
        counts[file.reason] = counts.get(file.reason, 0) + file.count
        first.setdefault(file.reason, file.file)
    reasons = sorted(counts, key=lambda reason: -counts[reason])
    lines = [f"  {counts[reason]:,}  {visible(first[reason])}: {visible(reason)}" for reason in reasons[:_MAX_REASONS]]
    return [*lines, f"  … and {len(reasons) - _MAX_REASONS:,} more reasons"] if len(reasons) > _MAX_REASONS else lines


def write_left_out(path: Path, files: Iterable[BadFile]) -> None:
    """Write all entries, one JSON object per line, sorted by name."""
    with atomic_file(path) as part:
        lines = []
        for file in sorted(files, key=lambda file: file.file):
            count = {"count": file.count} if file.count > 1 else {}
            lines.append(json.dumps({"file": file.file, "reason": file.reason, **count}) + "\n")
        part.write_text("".join(lines))
