"""The roles of a table's columns: image, captions, source image, others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.errors import UserError
from lit_lora.visible import visible

IMAGE_NAMES = (
    "file_name", "image", "image_path", "img_path", "file_path", "filepath", "filename", "path", "file", "img",
    "jpg", "png", "webp",
)  # fmt: skip
CAPTION_NAMES = (
    "text", "caption", "captions", "prompt", "description", "alt_text", "title", "instruction", "edit_prompt",
)  # fmt: skip
_KINDS = ("file_name", "image", "img")
TARGET_NAMES = tuple(f"{role}_{kind}" for role in ("target", "output", "edited") for kind in _KINDS)
SOURCE_NAMES = tuple(f"{role}_{kind}" for role in ("source", "input", "original") for kind in _KINDS)
"""Columns of editing pairs; that of the target is the table's image."""

_METADATA_IMAGES = (
    "file_name",
    *(name for name in TARGET_NAMES if name.endswith("file_name")),
)  # as datasets prescribes


@dataclass(frozen=True)
class TableColumns:
    """The roles of a table's columns.

    Attributes:
        image: Column of the image or its path.
        captions: Columns of captions; the first in which a row has a text or a list of texts is used.
        caption_key: Key in the ``.json`` member under which several captions of one image are packed. Defaults to "caption".
        source: Column of the source image or its path, of editing pairs. Defaults to None: there is none.
    """

    image: str
    captions: tuple[str, ...]
    caption_key: str = "caption"
    source: str | None = None

    @classmethod
    def choose(
        cls,
        where: object,
        columns: Iterable[str],
        image: str | None,
        caption: str | None,
        caption_key: str,
        source: str | None = None,
        images: Sequence[str] = (),
        metadata: bool = False,
    ) -> TableColumns:
        """Choose the columns that the user names, or else those with usual names.

        Args:
            where: Name of the table, for messages.
            columns: Names of all columns.
            image: Column of images that the user names, or None.
            caption: Column of captions that the user names, or None.
            caption_key: Key for several captions, as in the class.
            source: Column of source images that the user names. Defaults to None: one with a usual name, if there is one.
            images: Columns that hold images themselves: the first is taken, or that with the name of a target. Defaults to none.
            metadata: Whether it is a metadata file, whose column of images has one of few names. Defaults to False.

        Raises:
            UserError: If there is no such column.
        """
        columns = list(columns)
        found = source and _choose(where, columns, "source_column", source, ())[0]
        found = found or next(iter(_usual(columns, _sources_beside(columns))), None)
        others = [name for name in images if name != found]
        image = image or next(iter([*_usual(others, TARGET_NAMES), *others]), None)
        usual = _METADATA_IMAGES if metadata else (*IMAGE_NAMES, *TARGET_NAMES)
        return cls(
            _choose(where, columns, "image_column", image, usual)[0],
            _choose(where, columns, "caption_column", caption, CAPTION_NAMES),
            caption_key,
            found,
        )

    def texts(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        """The members of a row besides the image: ``txt`` for the caption, ``json`` for all other columns.

        Raises:
            BadSampleError: If the row has no caption, or contains invalid Unicode.
        """
        column = next((name for name in self.captions if _is_caption(row.get(name))), None)
        if column is None:
            raise BadSampleError(f"has no caption (a text under {' or '.join(self.captions)})")
        others = {name: _plain(value) for name, value in row.items() if name not in (self.image, self.source, column)}
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
    if not (found := tuple(_usual(columns, usual))):
        raise UserError(
            f"{visible(where)} has no column with a usual name ({', '.join(usual)}); set {option} to one of its columns:"
            f" {_listed(columns)}"
        )
    return found


def _usual(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns with one of these names, in any spelling, in the order of the names."""
    return [column for name in names for column in columns if column.lower() == name]


def _sources_beside(columns: Sequence[str]) -> Sequence[str]:
    """Names of columns that are taken for sources: one alone tells it, the others do beside a target."""
    return SOURCE_NAMES if _usual(columns, TARGET_NAMES) else SOURCE_NAMES[:1]


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
