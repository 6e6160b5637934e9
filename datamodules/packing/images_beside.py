"""Masks and source images, which are packed with the image of the same name beside them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Set
from pathlib import Path, PurePosixPath

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.indexing.extensions import MASK_EXTENSION, SOURCE_EXTENSIONS
from lit_lora.datamodules.packing.image_formats import IMAGE_FILES, NOT_AN_IMAGE, PACKED_IMAGES, image_extension
from lit_lora.visible import visible

IMAGES_BESIDE = (MASK_EXTENSION, *(f"source.{extension}" for extension in PACKED_IMAGES))
"""Endings of the images that are packed with another one."""

MEMBERS = {"caption": "txt"}
"""Endings of members that differ from those of the files."""

_KINDS = (".mask", ".source")


def is_beside_another(file: str, siblings: Set[str]) -> bool:
    """Whether an image is the mask or the source of another one beside it.

    Args:
        file: Path of the image.
        siblings: Names of the files in its folder.
    """
    stem, dot, ending = file.rpartition("/")[2].partition(".")
    while dot and ending not in IMAGES_BESIDE:  # names may have more dots
        first, dot, ending = ending.partition(".")
        stem = f"{stem}.{first}"
    return bool(dot) and any(images_named(stem, siblings))


def why_no_image(file: str) -> str:
    """Why an image without a caption of its own is none to train on; empty if its name is not that of a mask or source.

    Args:
        file: Path of an image that :func:`is_beside_another` is not true of.
    """
    kind = PurePosixPath(PurePosixPath(file).stem).suffix.lower()
    if kind not in _KINDS:
        return ""
    endings = ", ".join(
        f"NAME.{ending}" for ending in (MASK_EXTENSION, *SOURCE_EXTENSIONS) if f".{ending}".startswith(kind)
    )
    return (
        f"is named like a {kind[1:]} and belongs to no image: write {endings} beside the image NAME, or rename it if it is "
        "to be trained on"
    )


def images_named(stem: str, siblings: Set[str]) -> Iterator[str]:
    """Images of a name, with any ending."""
    images = (f"{stem}.{each}" for low in IMAGE_FILES for each in (low, low.upper(), low.capitalize()))
    return (image for image in images if image in siblings)


def source_member(file: str) -> str:
    """Name of the member that holds a source image, before its conversion to a format of shards."""
    return f"source.{image_extension(file)}"


def check_source(file: str, beside: Collection[str]) -> None:
    """Check a source image that is not beside its target.

    Args:
        file: Path of the source.
        beside: Names of the target's members.

    Raises:
        BadSampleError: If it is no image, or another source is beside the target.
    """
    if not image_extension(file):
        raise BadSampleError(f"its source {visible(file)} {NOT_AN_IMAGE}")
    if others := [name for name in beside if name.startswith("source.")]:
        raise BadSampleError(f"has two sources, {visible(file)} and one beside it (.{others[0]}); remove one")


def images_beside(image: Path) -> dict[str, Path]:
    """The mask and the source of an image by the endings of their members, also if they cannot be read."""
    paths = ((ending, image.with_suffix(f".{ending}")) for ending in IMAGES_BESIDE)
    return {MEMBERS.get(ending, ending): path for ending, path in paths if os.path.lexists(path)}
