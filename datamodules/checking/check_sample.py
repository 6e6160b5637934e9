"""Check of one sample of a shard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from safetensors import SafetensorError

from lit_lora.datamodules.decoding.captions import MAX_JSON_BYTES, MAX_TEXT_BYTES, Captions
from lit_lora.datamodules.decoding.decode import BadSampleError, check_pixels, decode_rgb
from lit_lora.datamodules.decoding.mask import decode_mask
from lit_lora.datamodules.decoding.source_image import decode_source
from lit_lora.datamodules.indexing.extensions import IMAGE_EXTENSIONS, MASK_EXTENSION, SOURCE_EXTENSIONS
from lit_lora.datamodules.indexing.image_format import image_format
from lit_lora.datamodules.indexing.scan import CACHED_EXTENSION, image_size

NO_IMAGE = "no image"
EMPTY_IMAGE = "empty image"
UNREADABLE_HEADER = "unreadable image header"
TOO_MANY_PIXELS = "too many pixels"
UNDECODABLE = "undecodable image"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"
NOT_UTF8 = "caption not UTF-8"
LONG_CAPTION = "caption too long"
UNREADABLE_CAPTION = "unreadable caption"
WRONG_EXTENSION = "wrong extension"
BAD_SOURCE = "unusable source image"
BAD_MASK = "unusable mask"

_HEADER_BYTES = 65536
_LIMITS = {"txt": MAX_TEXT_BYTES, "cls": MAX_TEXT_BYTES, "json": MAX_JSON_BYTES}


def check_sample(
    file: BinaryIO, members: Mapping[str, tuple[int, int]], decode: bool, captions: Captions
) -> Iterator[tuple[str, str]]:
    """Yield kind and detail of all problems of a sample.

    Args:
        file: Open file of the shard.
        members: Offset and size of the sample's members in bytes, by extension.
        decode: Whether to decode the image instead of reading only its header.
        captions: Sources of captions.
    """
    image = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
    if image is not None:
        yield from _check_image(file, *members[image], image, decode)
    elif CACHED_EXTENSION not in members:
        yield NO_IMAGE, f"none of {', '.join(f'.{extension}' for extension in IMAGE_EXTENSIONS)}"
    elif decode and not _is_safetensors(_read(file, *members[CACHED_EXTENSION])):
        yield UNDECODABLE, f"the .{CACHED_EXTENSION} member is damaged"
    if image is not None and decode:
        yield from _check_beside(file, members, image)
    texts = {extension: members[extension] for extension in captions.extensions if extension in members}
    yield from _check_caption(file, texts, captions)


def _check_image(file: BinaryIO, offset: int, size: int, extension: str, decode: bool) -> Iterator[tuple[str, str]]:
    if not size:
        yield EMPTY_IMAGE, f"the .{extension} member has 0 bytes"
        return
    data = _read(file, offset, size if decode else min(size, _HEADER_BYTES))
    if not decode and image_size(data) == (0, 0):
        data = _read(file, offset, size)
    if refusal := _refusal(data):
        yield refusal
        return
    found = image_format(data)
    if found != ("jpg" if extension == "jpeg" else extension):
        yield WRONG_EXTENSION, f"{found} data in .{extension}"
    if decode:
        try:
            decode_rgb(data)
        except BadSampleError as error:
            yield UNDECODABLE, str(error)


def _check_beside(file: BinaryIO, members: Mapping[str, tuple[int, int]], image: str) -> Iterator[tuple[str, str]]:
    """Problems of the source image and the mask."""
    sources = {extension: _read(file, *members[extension]) for extension in SOURCE_EXTENSIONS if extension in members}
    size = image_size(_read(file, *members[image])) if sources or MASK_EXTENSION in members else (0, 0)
    if size == (0, 0):
        return
    if sources:
        try:
            decode_source(sources, size)
        except BadSampleError as error:
            yield BAD_SOURCE, str(error)
    if MASK_EXTENSION in members:
        try:
            decode_mask({MASK_EXTENSION: _read(file, *members[MASK_EXTENSION])}, "mask.png", size)
        except BadSampleError as error:
            yield BAD_MASK, str(error)


def _refusal(data: bytes) -> tuple[str, str] | None:
    """Kind and detail of the problem for which an image is refused by its header; None if there is none."""
    size = image_size(data)
    try:
        check_pixels(*size)
    except BadSampleError as error:
        return UNREADABLE_HEADER if size == (0, 0) else TOO_MANY_PIXELS, str(error)
    return None


def _check_caption(
    file: BinaryIO, places: Mapping[str, tuple[int, int]], captions: Captions
) -> Iterator[tuple[str, str]]:
    if not places:
        yield NO_CAPTION, f"none of {', '.join(f'.{extension}' for extension in captions.extensions)}"
        return
    # One byte above the limit suffices for a refusal.
    texts = {ext: _read(file, offset, min(size, _LIMITS[ext] + 1)) for ext, (offset, size) in places.items()}
    try:
        if not captions.draw(texts, seed=0, slot=0):
            yield EMPTY_CAPTION, ""
    except BadSampleError as error:
        too_long = [(ext, size) for ext, (_, size) in places.items() if size > _LIMITS[ext]]
        if too_long:
            yield (
                LONG_CAPTION,
                "; ".join(f".{ext} has {size} bytes, more than {_LIMITS[ext]}" for ext, size in too_long),
            )
        elif not all(_is_utf8(text) for text in texts.values()):
            yield NOT_UTF8, str(error)
        else:
            yield UNREADABLE_CAPTION, str(error)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_safetensors(data: bytes) -> bool:
    from safetensors.torch import load

    try:
        load(data)
    except (SafetensorError, ValueError, KeyError):
        return False
    return True


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)
