"""The roles of a table's columns: image, captions, others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.errors import UserError
from lit_lora.visible import visible

IMAGE_NAMES = (
    "file_name", "image", "image_path", "img_path", "file_path", "filepath", "filename", "path", "file", "img",
    "jpg", "png", "webp",
)  # fmt: skip
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "description", "alt_text", "title")


@dataclass(frozen=True)
class TableColumns:
    """The roles of a table's columns.

    Attributes:
        image: Column of the image or its path.
        captions: Columns of captions; the first in which a row has a text or a list of texts is used.
        caption_key: Key in the ``.json`` member under which several captions of one image are packed. Defaults to "caption".
    """

    image: str
    captions: tuple[str, ...]
    caption_key: str = "caption"

    @classmethod
    def choose(
        cls, where: object, columns: Iterable[str], image: str | None, caption: str | None, caption_key: str
    ) -> TableColumns:
        """Choose the columns that the user names, or else those with usual names.

        Args:
            where: Name of the table, for messages.
            columns: Names of all columns.
            image: Column of images that the user names, or None.
            caption: Column of captions that the user names, or None.
            caption_key: Key for several captions, as in the class.

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
        """The members of a row besides the image: ``txt`` for the caption, ``json`` for all other columns.

        Raises:
            BadSampleError: If the row has no caption, or contains invalid Unicode.
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
            raise UserError(f"{visible(where)} has no column {given!r} ({option}); its columns are {_listed(columns)}")
        return (given,)
    found = tuple(column for name in usual for column in columns if column.lower() == name)
    if not found:
        raise UserError(
            f"{visible(where)} has no column with a usual name ({', '.join(usual)}); set {option} to one of its columns:"
            f" {_listed(columns)}"
        )
    return found


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(map(visible, columns))


def _is_caption(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(text, str) for text in value)
    return isinstance(value, str) and value != ""


def _plain(value: Any) -> Any:
    # Tables contain NaN for missing numbers, which JSON cannot represent.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can encode half of a surrogate pair
        raise BadSampleError(f"the row has text that is not Unicode (character {error.start})") from error
