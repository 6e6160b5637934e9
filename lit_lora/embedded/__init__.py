"""The small base model that ships with the package."""

from __future__ import annotations

from pathlib import Path

NAME = "embedded"
"""What to write in place of a folder or hub id."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The digits by the words that the model was trained with."""


def base_path() -> Path:
    """The folder of the embedded Stable Diffusion pipeline."""
    return Path(__file__).parent / "base"


def resolve(pretrained_model_name_or_path: str) -> str:
    """The folder behind ``embedded``; anything else as it is."""
    return str(base_path()) if pretrained_model_name_or_path == NAME else pretrained_model_name_or_path
