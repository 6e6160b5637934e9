"""Names by which the splits of a data set are recognized, as in Hugging Face's image folders."""

from __future__ import annotations

import re
from pathlib import Path

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}
_BEGINNING = re.compile(rf"({'|'.join(_SPLIT_OF)})(?=[-_. 0-9]|$)", re.IGNORECASE)


def split_of_folder(name: str) -> str:
    """The split that a folder's name says: train, validation or test; empty if none."""
    return _SPLIT_OF.get(name.lower(), "")


def split_of_file(name: str) -> str:
    """The split that the beginning of a file's name says, as in ``test-00000-of-00001.parquet``; empty if none."""
    found = _BEGINNING.match(name)
    return _SPLIT_OF[found[1].lower()] if found else ""


def validation_folder(folder: Path) -> Path | None:
    """The folder of validation or test images beside one of training images, as in HF's image folders; None without it."""
    if not folder.is_dir():
        return None
    splits = {split_of_folder(entry.name): entry for entry in sorted(folder.iterdir()) if entry.is_dir()}
    return splits.get("validation", splits.get("test")) if "train" in splits else None
