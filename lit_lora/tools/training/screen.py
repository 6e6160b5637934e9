"""What ``lit-lora train`` shows on the screen."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_lora.tools.training.choices import Choice


def table(choices: Sequence[Choice]) -> str:
    """A line for each choice: what, its value and why."""
    widths = [max(len(choice[column]) for choice in choices) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {value:{widths[1]}}  {why}" for name, value, why in choices)


def ending(trainer: Any, out: Path, prompt: str) -> str:
    """Where the adapter and all that belongs to it are, and the next command.

    Args:
        trainer: Trainer of the run.
        out: Folder of the run.
        prompt: A prompt for the next command.
    """
    adapter = Path(trainer.checkpoint_callback.last_model_path).with_suffix(".adapter")
    return f"\nadapter  {adapter}\n\nNext: lit-lora sample --adapter {shlex.quote(str(adapter))} --prompts {shlex.quote(prompt)}"
