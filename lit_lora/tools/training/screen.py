"""What ``lit-lora train`` shows on the screen."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.packing.left_out import count_files, format_reasons
from lit_lora.datamodules.packing.pack import PackSummary
from lit_lora.report_text import format_next, format_note, format_option, format_reason
from lit_lora.tools.training.choices import Choice
from lit_lora.visible import visible


def table(choices: Sequence[Choice]) -> str:
    """What was chosen, its value and why, in lines of at most 80 columns."""
    widths = [max(len(choice[column]) for choice in choices) for column in (0, 1)]
    rows = [f"{name:{widths[0]}}  {value:{widths[1]}}  {why}" for name, value, why, _ in choices]
    indent = " " * (sum(widths) + 4)
    return "\n".join(
        textwrap.fill(row, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) for row in rows
    )


def ending(results: Mapping[str, str], prompt: str) -> str:
    """Where the results of a run are, and the next command.

    Args:
        results: Paths by what they are, with ``folder`` as that of all others; empty if the options given have the run saved
            elsewhere.
        prompt: A prompt for the next command.
    """
    if "folder" not in results or not ("best" in results or "adapter" in results):
        return "\nthe run's folder holds no adapter: it is where the logger or the callbacks given by options save it"
    folder = results["folder"]
    lines = [f"  {name:7}  {path}" for name, path in results.items() if name != "folder"]
    adapter = shlex.quote(str(Path(folder, results.get("best") or results["adapter"])))
    following = format_next("lit-lora sample --count 4", format_option("prompts", prompt), f"--adapter {adapter}")
    return "\n".join(["", f"results in {folder}", *lines, following])


def packed_lines(name: str, packed: PackSummary, apart: Path | None = None) -> list[str]:
    """What was packed, what was left out and why, and the notes.

    Args:
        name: Name of the line.
        packed: Result of packing.
        apart: Folder of the images that are packed apart. Defaults to none.
    """
    files = [one for one in (*packed.bad, *packed.skipped) if apart is None or one.file != f"{apart.name}/"]
    left_out = f", {count_files(files):,} left out (see {visible(packed.folder / 'bad.jsonl')})" if files else ""
    earlier = " by an earlier run" if packed.resumed == packed.shards else ""
    count = f"{packed.samples:,} {'image' if packed.samples == 1 else 'images'}"
    written = f"{name:<8} {count}, {format_bytes(packed.size)}{left_out}{earlier}"
    return [written, *map(format_reason, format_reasons(files)), *map(format_note, packed.notes)]
