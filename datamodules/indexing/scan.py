"""Scan of a tar shard for the position of each member and the size of each image."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from lit_lora.datamodules.indexing.image_format import image_format
from lit_lora.datamodules.indexing.tar_headers import (
    MAX_MEMBER_BYTES,
    READ_ERRORS,
    BoundedTarInfo,
    describe,
    read_headers,
)
from lit_lora.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of images; if a sample has several images, the first extension in this order is used."""

CACHED_EXTENSION = "safetensors"
"""Extension of the member that replaces the image in a cache of latents."""

OTHER_EXTENSIONS = ("npy", "npz", "bin")
"""Extensions for a custom :class:`~lit_lora.datamodules.decoding.sample_decoder.SampleDecoder`."""

EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", "cls", CACHED_EXTENSION, *OTHER_EXTENSIONS)
"""Extensions of the members that are indexed; all others are ignored."""

_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "jpg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
}
"""Pillow's readers by format. ``Image.open`` would refuse large images without returning their size."""

_HEADER_BYTES = 65536
_EXIF_ORIENTATION = 0x0112
_END_MARKER_BYTES = 1024
_MAX_SIDE = 2**31 - 1  # what the column of the index holds


@dataclass
class ScannedShard:
    """The samples of a shard in their order, and their members.

    Attributes:
        keys: Keys of the samples.
        sizes: Width and height of each sample's image after the rotation by EXIF, in pixels; (0, 0) if there is no readable
            image.
        members: Sample number, number in ``EXTENSIONS``, data offset and data size in bytes of each member.
    """

    keys: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    members: list[tuple[int, int, int, int]] = field(default_factory=list)


def scan_shard(path: Path) -> ScannedShard:
    """Read the headers of a shard's members and images.

    Raises:
        UserError: If the shard is truncated or damaged, contains no samples, or contains a key twice.
    """
    shard = ScannedShard()
    seen: set[str] = set()
    extensions: set[int] = set()
    with path.open("rb") as file:
        for key, extension, offset, size in walk_members(path, file):
            if not shard.keys or key != shard.keys[-1]:
                if key in seen:
                    raise _duplicate(path, key)
                seen.add(key)
                shard.keys.append(key)
                shard.sizes.append((0, 0))
                extensions = set()
            if extension in extensions:
                raise _duplicate(path, key)
            extensions.add(extension)
            if extension < len(IMAGE_EXTENSIONS) and extension == min(extensions):
                shard.sizes[-1] = _size_in_file(file, offset, size)
            elif EXTENSIONS[extension] == CACHED_EXTENSION:
                shard.sizes[-1] = _size_of_cached(file, offset, size)
            shard.members.append((len(shard.keys) - 1, extension, offset, size))
    if not shard.keys:
        raise UserError(f"{path} holds no samples (members that end in {', '.join(EXTENSIONS)}); remove it")
    return shard


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image after the rotation by EXIF, in pixels; (0, 0) if its header cannot be read.

    Only the header is read, so the size of an image is not limited.
    """
    try:
        image = _OPENERS[image_format(data)](io.BytesIO(data))
    except Exception:  # Pillow's readers raise almost any exception on damaged bytes
        return 0, 0
    width, height = _bounded(*image.size)
    return (height, width) if _is_turned(image) else (width, height)


def _is_turned(image: ImageFile) -> bool:
    # torchvision applies EXIF only in JPEG and PNG. Without the test for "exif" Pillow would decode the whole PNG.
    if image.format == "WEBP" or "exif" not in image.info:
        return False
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF is ignored
        return False


def _size_in_file(file: io.BufferedReader, offset: int, size: int) -> tuple[int, int]:
    found = image_size(os.pread(file.fileno(), min(size, _HEADER_BYTES), offset))
    if found == (0, 0) and _HEADER_BYTES < size <= MAX_MEMBER_BYTES:
        found = image_size(os.pread(file.fileno(), size, offset))
    return found


def _bounded(width: int, height: int) -> tuple[int, int]:
    """The size of an image; (0, 0), which is an unknown size, for one that the index cannot hold."""
    return (width, height) if min(width, height) >= 0 and max(width, height) <= _MAX_SIDE else (0, 0)


def _size_of_cached(file: io.BufferedReader, offset: int, size: int) -> tuple[int, int]:
    """Width and height of the image from which a cached sample was made, from its safetensors metadata."""
    try:
        length = int.from_bytes(os.pread(file.fileno(), 8, offset), "little")
        metadata = json.loads(os.pread(file.fileno(), min(length, size, _HEADER_BYTES), offset + 8))["__metadata__"]
        return _bounded(int(metadata["width"]), int(metadata["height"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0, 0


def walk_members(path: Path, file: io.BufferedReader) -> Iterator[tuple[str, int, int, int]]:
    """Key, number in ``EXTENSIONS``, data offset and size of each indexed member, in the order of the archive.

    Raises:
        UserError: If the shard is truncated or damaged.
    """
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as archive:
            for info in read_headers(archive):
                key, extension = _split_name(info.name)
                if info.isreg() and not info.issparse() and key and extension in EXTENSIONS:
                    yield key, EXTENSIONS.index(extension), info.offset_data, info.size
                end = archive.offset
    except READ_ERRORS as error:
        raise _damaged(path, min(end, path.stat().st_size), describe(error)) from error
    _check_end(path, file, end)


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension by webdataset's rule: the key ends at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem else ("", "")


def _check_end(path: Path, file: io.BufferedReader, offset: int) -> None:
    """Check that the end marker follows, since ``tarfile`` stops silently at a header that it cannot read."""
    file.seek(offset)
    rest = offset
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise _damaged(path, offset, "no member starts there and it is not the end of the archive")
        rest += len(chunk)
    if rest - offset < _END_MARKER_BYTES:
        raise _damaged(path, rest, "the end of the archive is missing")


def _damaged(path: Path, offset: int, reason: str) -> UserError:
    return UserError(f"{path} is truncated or damaged at byte {offset} ({reason}); pack it again or remove it")


def _duplicate(path: Path, key: str) -> UserError:
    return UserError(
        f"{path} holds the key {key!r} twice, or the members of this sample are not next to each other;"
        " pack it again with unique keys in sorted order (`tar --sort=name`)"
    )
