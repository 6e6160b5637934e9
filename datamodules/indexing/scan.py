"""Scan of a tar shard for the position of each member and the size of each image."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from lit_lora.datamodules.indexing.extensions import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MASK_EXTENSION,
    SOURCE_EXTENSIONS,
)
from lit_lora.datamodules.indexing.image_format import image_format
from lit_lora.datamodules.indexing.tar_headers import MAX_MEMBER_BYTES, walk_headers
from lit_lora.datamodules.indexing.unread_members import UnreadMembers, split_name
from lit_lora.errors import UserError
from lit_lora.visible import visible

CACHED_EXTENSION = "safetensors"
"""Extension of the member that replaces the image in a cache of latents."""

OTHER_EXTENSIONS = ("npy", "npz", "bin")
"""Extensions for a custom :class:`~lit_lora.datamodules.decoding.sample_decoder.SampleDecoder`."""

EXTENSIONS = (
    *IMAGE_EXTENSIONS,
    *CAPTION_EXTENSIONS,
    CACHED_EXTENSION,
    *OTHER_EXTENSIONS,
    MASK_EXTENSION,
    *SOURCE_EXTENSIONS,
)
"""Extensions of the members that are indexed; all others are passed over."""

_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "jpg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
}
"""Pillow's readers by format. ``Image.open`` would refuse large images without returning their size."""

_HEADER_BYTES = 65536
_EXIF_ORIENTATION = 0x0112
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
    """Read the headers of a shard's members and images, and warn of samples that are passed over.

    Raises:
        UserError: If the shard is truncated or damaged, contains no samples, or contains a key twice.
    """
    shard = ScannedShard()
    seen: set[str] = set()
    extensions: set[int] = set()
    unread = UnreadMembers()
    with path.open("rb") as file:
        for key, extension, offset, size in walk_members(path, file, unread):
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
        raise _without_samples(path, unread)
    if unread.lost:
        warnings.warn(f"{visible(path)}: {unread.describe_lost()}, so they are not trained on", stacklevel=2)
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
    if "exif" not in image.info:  # without this test Pillow would decode the whole PNG
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


def walk_members(
    path: Path, file: io.BufferedReader, unread: UnreadMembers | None = None
) -> Iterator[tuple[str, int, int, int]]:
    """Key, number in ``EXTENSIONS``, data offset and size of each indexed member, in the order of the archive.

    Args:
        path: Path of the shard, for messages.
        file: The shard, open for reading.
        unread: Gets the other members. Defaults to None.

    Raises:
        UserError: If the shard is truncated or damaged.
    """
    for info in walk_headers(path, file):
        key, extension = split_name(info.name)
        if info.isreg() and not info.issparse() and key and extension in EXTENSIONS:
            yield key, EXTENSIONS.index(extension), info.offset_data, info.size
        elif unread is not None:
            unread.add(info)


def _without_samples(path: Path, unread: UnreadMembers) -> UserError:
    what = f"{visible(path)} holds no samples (members that end in {', '.join(EXTENSIONS)})"
    if unread.lost:
        return UserError(f"{what}: {unread.describe_lost()}")
    names = [name for names in unread.others.values() for name in names]
    first = f": {len(names)} members have other names, first {visible(names[0])}" if names else ""
    return UserError(f"{what}{first}; remove it")


def _duplicate(path: Path, key: str) -> UserError:
    return UserError(
        f"{visible(path)} holds the key '{visible(key)}' twice, or the members of this sample are not next to each other;"
        " pack it again with unique keys in sorted order (`tar --sort=name`)"
    )
