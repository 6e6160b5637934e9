"""What ``lit-lora train`` shows on the screen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from lit_lora.tools.training.choices import Choice


def table(choices: Sequence[Choice]) -> str:
    """A line for each choice: what, its value and why."""
    widths = [max(len(choice[column]) for choice in choices) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {value:{widths[1]}}  {why}" for name, value, why, _ in choices)


def ending(results: Mapping[str, str], prompt: str) -> str:
    """Where the results of a run are, and the next command.

    Args:
        results: Paths by what they are: ``best`` or ``adapter`` is there, the adapter's folder.
        prompt: A prompt for the next command.
    """
    width = max(map(len, results))
    lines = [f"{name:{width}}  {path}" for name, path in results.items()]
    adapter = results.get("best") or results["adapter"]
    command = f"lit-lora sample --adapter {shlex.quote(adapter)} \\\n  --prompts {shlex.quote(prompt)} --count 4"
    return "\n".join(["", *lines, "", "Next:", command])
