"""The small base model that ships with the package."""

from __future__ import annotations

from pathlib import Path

NAME = "embedded"
"""Name of the embedded base model, used in place of a folder or hub id."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Names of the digits in the captions that the model was trained on."""


def base_path() -> Path:
    """The folder of the embedded Stable Diffusion pipeline."""
    return Path(__file__).parent / "base"


def resolve(pretrained_model_name_or_path: str) -> str:
    """Replace ``embedded`` by the folder of the embedded pipeline; return any other name unchanged."""
    return str(base_path()) if pretrained_model_name_or_path == NAME else pretrained_model_name_or_path
