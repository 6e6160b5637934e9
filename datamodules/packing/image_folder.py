"""Packing of a folder of images with a caption file beside each."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.indexing.extensions import MASK_EXTENSION
from lit_lora.datamodules.packing.caption_template import CaptionTemplate
from lit_lora.datamodules.packing.image_formats import IMAGE_FILES, extension_of, image_extension
from lit_lora.datamodules.packing.input import PackInput, packed_size, show_planning
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.datamodules.packing.sample_names import SampleNames
from lit_lora.datamodules.packing.walk import walk_files

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource

_SIDES = ("txt", "json", "TXT", "JSON", "Txt", "Json", MASK_EXTENSION)
"""Endings of the files beside images; of those that differ only in capitals, the first that is there is read."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageFolder(PackInput):
    """Images at any depth, each with a ``.txt`` or ``.json`` file of the same name beside it; endings may be in capitals.

    A ``.mask.png`` file of the same name, the mask of the loss, is packed with its image.

    Attributes:
        folder: Folder of the images.
        names: Paths of the images, relative to ``folder``.
        sides: Files beside each image, one bit for each entry of ``_SIDES``, uint8 (N,).
        template: Makes the captions in place of the files beside the images; None to read these.
    """

    captions_are_beside = True

    folder: Path
    names: SampleNames
    sides: NDArray[np.uint8]
    template: CaptionTemplate | None = None

    @classmethod
    def find(cls, source: PackSource) -> ImageFolder | None:
        """The images of a folder, unless a metadata file lists them with their captions."""
        if not source.has_images or (source.metadata and source.template is None):
            return None
        return cls.scan(source.path, skip=source.out, template=source.template)

    @classmethod
    def scan(cls, folder: Path, skip: Path | None = None, template: CaptionTemplate | None = None) -> ImageFolder:
        """All images below a folder, except below ``skip``, sorted by path, with captions beside them or by a template.

        Raises:
            UserError: If a folder cannot be read.
        """
        bad: list[BadFile] = []
        skipped: list[BadFile] = []
        sizes, sides = array("q"), array("B")
        unread: list[str] = []
        digest = hashlib.sha256()

        def good_files() -> Iterator[str]:
            for file, siblings in walk_files(folder, skip):
                if _is_mask(file, siblings):
                    continue
                if not image_extension(file):
                    if template is None and (reason := _why_no_caption(file, siblings)):
                        skipped.append(BadFile(file, reason))
                    unread.extend([file] if template is not None and extension_of(file) in _SIDES else [])
                    continue
                try:
                    bits = _find_sides(file, siblings, template is None)
                    size, stamp = stat_files(_paths(folder, file, bits))
                    size += 0 if template is None else packed_size(len(template.caption(file, folder)))
                except BadSampleError as error:
                    bad.append(BadFile(file, str(error)))
                    continue
                sizes.append(size)
                sides.append(bits)
                digest.update(f"{file}\t{stamp}\n".encode("utf-8", "surrogateescape"))
                yield file

        names = SampleNames.of(show_planning(good_files()))
        if unread:
            skipped.append(BadFile(unread[0], "is not read: captions are made from names", len(unread)))
        return cls(
            folder=folder,
            names=names,
            sides=np.array(sides, np.uint8),
            sizes=np.array(sizes, np.int64),
            fingerprint=digest.hexdigest(),
            bad=tuple(bad),
            skipped=tuple(skipped),
            template=template,
        )

    def name(self, sample: int) -> str:
        return self.names[sample]

    def key(self, sample: int) -> str:
        return self.names.key(sample)

    def members(self, sample: int) -> dict[str, bytes]:
        paths = _paths(self.folder, self.names[sample], int(self.sides[sample]))
        members = {extension: read_file(path) for extension, path in paths.items()}
        if self.template is None:
            return members
        return members | {"txt": self.template.caption(self.names[sample], self.folder)}

    def select(self, samples: NDArray[np.int64]) -> ImageFolder:
        return replace(
            self,
            names=self.names.select(samples),
            sides=self.sides[samples],
            sizes=self.sizes[samples],
            bad=(),
            skipped=(),
        )


def read_file(path: Path) -> bytes:
    """Read a file.

    Raises:
        BadSampleError: If the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSampleError(f"cannot be read ({error.strerror})") from error


def stat_files(paths: dict[str, Path]) -> tuple[int, str]:
    """Size of a sample's files in a tar, and a fingerprint that changes when a file changes.

    Args:
        paths: Paths of the files by extension.

    Raises:
        BadSampleError: If a file is missing, or an image is empty.
    """
    sizes, stamps = [], []
    for extension, path in paths.items():
        try:
            stat = path.stat()
        except OSError as error:
            raise BadSampleError(f"cannot be read ({error.strerror})") from error
        if stat.st_size == 0 and extension in IMAGE_FILES:
            raise BadSampleError("the image is empty")
        sizes.append(stat.st_size)
        stamps.append(f"{extension} {stat.st_size} {stat.st_mtime_ns}")
    return packed_size(*sizes), " ".join(stamps)


def _find_sides(file: str, siblings: Set[str], captions: bool) -> int:
    """The files beside an image, as bits; without captions only its mask."""
    image = PurePosixPath(file)
    found = {
        side.lower(): bit
        for bit, side in reversed(list(enumerate(_SIDES)))  # the first spelling stays
        if (captions or side == MASK_EXTENSION) and image.with_suffix(f".{side}").name in siblings
    }
    if captions and not found.keys() - {MASK_EXTENSION}:
        raise BadSampleError("has no caption (a .txt or .json file of the same name)")
    return sum(1 << bit for bit in found.values())


def _is_mask(file: str, siblings: Set[str]) -> bool:
    """Whether an image is the mask of another one beside it."""
    name = file.rpartition("/")[2]
    stem = name.removesuffix(f".{MASK_EXTENSION}")
    return stem != name and any(_beside(stem, siblings))


def _beside(stem: str, siblings: Set[str]) -> Iterator[str]:
    """Images of a name, with any ending."""
    images = (f"{stem}.{each}" for low in IMAGE_FILES for each in (low, low.upper(), low.capitalize()))
    return (image for image in images if image in siblings)


def _why_no_caption(file: str, siblings: Set[str]) -> str:
    """Why a file that looks like a caption is none; empty if it is one, or another kind of file."""
    side = extension_of(file)
    if side not in _SIDES:
        return ""
    stem, _, spelled = file.rpartition("/")[2].rpartition(".")
    if not any(_beside(stem, siblings)):
        return "is no caption of an image beside it"
    spellings = [each for each in _SIDES if each.lower() == side]
    read = next((each for each in spellings if f"{stem}.{each}" in siblings), None)
    if spelled == read:
        return ""
    return f"has the ending .{spelled}; write .{side}" if read is None else f"is beside {stem}.{read}, which is read"


def _paths(folder: Path, file: str, bits: int) -> dict[str, Path]:
    image = folder / file
    sides = {side.lower(): image.with_suffix(f".{side}") for bit, side in enumerate(_SIDES) if bits >> bit & 1}
    return {image_extension(file): image, **sides}
