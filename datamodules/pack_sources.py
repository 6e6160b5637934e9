"""What there is to pack in a folder of images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lit_lora.datamodules.decode import BadSampleError, check_pixels, decode_json, decode_rgb, decode_text
from lit_lora.datamodules.scan import IMAGE_EXTENSIONS, image_size
from lit_lora.errors import UserError

METADATA = "metadata.jsonl"

_CAPTION_COLUMNS = ("text", "caption")
_MAX_KEY_BYTES = 80  # with an extension it fits the 100 bytes of a plain tar header


@dataclass(frozen=True)
class BadFile:
    """An image that is left out."""

    file: str
    reason: str


@dataclass(frozen=True)
class PackSource:
    """One sample to pack.

    Attributes:
        file: The image, relative to the folder, with ``/``.
        key: The sample's key, without dots.
        members: By extension, what is packed: a file that is copied, or the bytes themselves.
        size: Bytes of all members.
        stamp: Changes when a member changes.
    """

    file: str
    key: str
    members: dict[str, Path | bytes]
    size: int
    stamp: str

    def read(self, caption_key: str) -> dict[str, bytes]:
        """The bytes of all members, after a check that training will accept them.

        Raises:
            BadSampleError: The image or the caption cannot be used.
        """
        try:
            data = {ext: m if isinstance(m, bytes) else m.read_bytes() for ext, m in self.members.items()}
        except OSError as error:
            raise BadSampleError(f"cannot be read ({error.strerror})") from error
        image = next(data[extension] for extension in IMAGE_EXTENSIONS if extension in data)
        check_pixels(*image_size(image))
        decode_rgb(image)
        if "txt" in data:
            decode_text(data["txt"])
        else:
            decode_json(data["json"], caption_key)
        return data


def find_sources(folder: Path) -> tuple[list[PackSource], list[BadFile]]:
    """The samples of a folder in the order of their names, and the files that cannot become samples.

    With a ``metadata.jsonl`` in the folder (Hugging Face's imagefolder), its lines are the samples; otherwise all
    images below the folder are, with a ``.txt`` or ``.json`` of the same name beside them.

    Raises:
        UserError: The folder is missing, holds no images, or its ``metadata.jsonl`` is not valid.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder that holds images")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    rows = _read_metadata(folder / METADATA) if METADATA in files else None
    if rows is None:
        nested = [file for file in files if PurePosixPath(file).name == METADATA]
        if nested:
            raise UserError(f"{folder / nested[0]} is not at the top of {folder}; pack {(folder / nested[0]).parent}")
    images = [file for file in files if _extension(file)] if rows is None else sorted(rows)
    if not images:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGE_EXTENSIONS)}); name another folder")
    sources: list[PackSource] = []
    bad: list[BadFile] = []
    taken: set[str] = set()
    for file in images:
        try:
            members = _members(folder, file, None if rows is None else rows[file])
            size, stamp = _measure(members)
            sources.append(PackSource(file, _unique_key(file, taken), members, size, stamp))
        except BadSampleError as error:
            bad.append(BadFile(file, str(error)))
    return sources, bad


def _extension(file: str) -> str:
    """The extension of an image in lower case; empty for other files."""
    extension = PurePosixPath(file).suffix[1:].lower()
    return extension if extension in IMAGE_EXTENSIONS else ""


def _members(folder: Path, file: str, row: dict[str, Any] | None) -> dict[str, Path | bytes]:
    path = folder / file
    if not _extension(file):
        raise BadSampleError(f"is not one of the image formats {', '.join(IMAGE_EXTENSIONS)}")
    members: dict[str, Path | bytes] = {_extension(file): path}
    if row is None:
        members |= {ext: side for ext in ("txt", "json") if (side := path.with_suffix(f".{ext}")).is_file()}
        if len(members) == 1:
            raise BadSampleError("has no caption (a .txt or .json file of the same name)")
        return members
    column = next((name for name in _CAPTION_COLUMNS if isinstance(row.get(name), str)), None)
    if column is None:
        raise BadSampleError(f"has no caption (a text under {' or '.join(_CAPTION_COLUMNS)} in {METADATA})")
    members["txt"] = row[column].encode("utf-8", "surrogateescape")
    if others := {name: value for name, value in row.items() if name not in ("file_name", column)}:
        members["json"] = json.dumps(others, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return members


def _measure(members: dict[str, Path | bytes]) -> tuple[int, str]:
    size = 0
    stamps: list[str] = []
    for extension, member in members.items():
        if isinstance(member, bytes):
            size += len(member)
            stamps.append(f"{extension} {hashlib.sha256(member).hexdigest()}")
            continue
        try:
            stat = member.stat()
        except OSError as error:
            raise BadSampleError(f"cannot be read ({error.strerror})") from error
        if stat.st_size == 0 and extension in IMAGE_EXTENSIONS:
            raise BadSampleError("the image is empty")
        size += stat.st_size
        stamps.append(f"{extension} {stat.st_size} {stat.st_mtime_ns}")
    return size, " ".join(stamps)


def _read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """The rows by their ``file_name``."""
    rows: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                file = PurePosixPath(row["file_name"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: not a JSON object with a file_name ({error})") from error
            if file.is_absolute() or ".." in file.parts:
                raise UserError(f"{path}, line {number}: {file} lies outside the folder; move it there")
            if str(file) in rows:
                raise UserError(f"{path}, line {number}: {file} comes twice; keep one of its lines")
            rows[str(file)] = row
    return rows


def _unique_key(file: str, taken: set[str]) -> str:
    stem = str(PurePosixPath(file).with_suffix("")).replace(".", "_")
    raw = stem.encode("utf-8", "surrogateescape")
    if len(raw) > _MAX_KEY_BYTES:
        digest = hashlib.sha256(raw).hexdigest()[:16]
        stem = f"{raw[: _MAX_KEY_BYTES - 24].decode('utf-8', 'ignore')}-{digest}"
    key, number = stem, 1
    while key in taken:
        number += 1
        key = f"{stem}-{number}"
    taken.add(key)
    return key
