"""Captions made from the names of images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lit_lora.errors import UserError

_FIELDS = ("name", "folder")
_REPEATS = re.compile(r"^\d+_(?=.)")
_NUMBER = re.compile(r"[\s(]*\d+\)?$")
_SEPARATORS = re.compile(r"[\s_-]+")


@dataclass(frozen=True)
class CaptionTemplate:
    """A text in which ``{name}`` and ``{folder}`` stand for the words of an image's name and of its folder's name.

    ``red_fox-01.png`` has the words ``red fox``: underscores and hyphens become spaces, and a number at the end is dropped,
    unless nothing else is left. The number at the front of ``10_fox``, which counts repeats in other trainers, is no part of a
    folder's words.

    Args:
        text: The text, such as ``a photo of a {folder}``. Without fields, all captions are the same.
        literal: Whether braces stand for themselves, so that all captions are the text as it is. Defaults to False.

    Raises:
        UserError: If the text is empty or has other fields.
    """

    text: str
    literal: bool = False

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise UserError("captions is empty; write a text, such as 'a photo of a {folder}'")
        unknown = (
            [] if self.literal else [field for field in re.findall(r"\{(\w*)\}", self.text) if field not in _FIELDS]
        )
        if unknown:
            raise UserError(
                f"captions={self.text!r} has the field {{{unknown[0]}}}; choose from {{name}} and {{folder}}"
            )

    def caption(self, file: str, source: Path) -> bytes:
        """The caption of an image, in UTF-8.

        Args:
            file: Path of the image, relative to ``source``.
            source: Folder of all images, whose name counts for the images directly in it.
        """
        if self.literal:
            return self.text.strip().encode()
        path = PurePosixPath(file)
        folder = path.parent.name or source.resolve().name
        words = {"name": _words(path.stem), "folder": _words(_REPEATS.sub("", folder))}
        text = re.sub(r"\{(\w+)\}", lambda found: words[found[1]], self.text).strip()
        return text.encode("utf-8", "replace")  # names of files may be in another encoding


def _words(name: str) -> str:
    spaced = _SEPARATORS.sub(" ", name).strip()
    return _NUMBER.sub("", spaced).strip() or spaced or name
