"""The columns of a table that hold images and captions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.errors import UserError

IMAGE_NAMES = (
    "file_name", "image", "image_path", "img_path", "file_path", "filepath", "filename", "path", "file", "img",
    "jpg", "png", "webp",
)  # fmt: skip
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "description", "alt_text", "title")


@dataclass(frozen=True)
class TableColumns:
    """The roles of a table's columns.

    Attributes:
        image: Holds the image, or where it is.
        captions: Of these, the first in which a row has a text, or a list of texts, holds its caption.
        caption_key: Several captions of one image are packed in a ``.json`` member under this key.
    """

    image: str
    captions: tuple[str, ...]
    caption_key: str = "caption"

    @classmethod
    def choose(
        cls, where: object, columns: Iterable[str], image: str | None, caption: str | None, caption_key: str
    ) -> TableColumns:
        """The columns that the user names, or those with the usual names.

        Args:
            where: The table, for messages.
            columns: All that it has.
            image: What the user says of the image.
            caption: What the user says of the caption.
            caption_key: See the class.

        Raises:
            UserError: If there is no such column.
        """
        columns = list(columns)
        return cls(
            _choose(where, columns, "image_column", image, IMAGE_NAMES)[0],
            _choose(where, columns, "caption_column", caption, CAPTION_NAMES),
            caption_key,
        )

    def texts(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        """The members that a row gives beside the image: ``txt`` for the caption, ``json`` for all other columns.

        Raises:
            BadSampleError: If the row has no caption, or text that is not Unicode.
        """
        column = next((name for name in self.captions if _is_caption(row.get(name))), None)
        if column is None:
            raise BadSampleError(f"has no caption (a text under {' or '.join(self.captions)})")
        others = {name: _plain(value) for name, value in row.items() if name not in (self.image, column)}
        caption = row[column]
        members = {"txt": _encode(caption)} if isinstance(caption, str) else {}
        if not members:
            for part in reversed(self.caption_key.split(".")):
                caption = {part: caption}
            others |= caption
        if others:
            members["json"] = _encode(json.dumps(others, sort_keys=True, ensure_ascii=False))
        return members


def _choose(
    where: object, columns: list[str], option: str, given: str | None, usual: tuple[str, ...]
) -> tuple[str, ...]:
    if given is not None:
        if given not in columns:
            raise UserError(f"{where} has no column {given!r} ({option}); its columns are {', '.join(columns)}")
        return (given,)
    found = tuple(column for name in usual for column in columns if column.lower() == name)
    if not found:
        raise UserError(
            f"{where} has no column with a usual name ({', '.join(usual)}); set {option} to one of its columns:"
            f" {', '.join(columns)}"
        )
    return found


def _is_caption(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(text, str) for text in value)
    return isinstance(value, str) and value != ""


def _plain(value: Any) -> Any:
    # JSON has no NaN, which tables have where a number is missing.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise BadSampleError(f"the row has text that is not Unicode (character {error.start})") from error
