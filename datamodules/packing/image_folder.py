"""Packing of a folder of images with a caption file beside each."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.packing.caption_template import CaptionTemplate
from lit_lora.datamodules.packing.image_formats import IMAGE_FILES, extension_of, image_extension
from lit_lora.datamodules.packing.images_beside import (
    IMAGES_BESIDE,
    MEMBERS,
    images_named,
    is_beside_another,
    why_no_image,
)
from lit_lora.datamodules.packing.input import PackInput, packed_size, show_planning
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.datamodules.packing.other_spelling import other_spelling
from lit_lora.datamodules.packing.sample_names import SampleNames
from lit_lora.datamodules.packing.walk import walk_files
from lit_lora.errors import UserError
from lit_lora.files import check_regular

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource

CAPTIONS = ("txt", "json", "caption")
"""Endings of files that may hold the caption of an image beside them. A ``.caption`` file is read if there is no ``.txt``."""

_SIDES = ("txt", "json", "TXT", "JSON", "Txt", "Json", "caption", *IMAGES_BESIDE)
"""Endings of the files beside images; of those that differ only in capitals, the first that is there is read."""


_CAPTION_BITS = sum(1 << bit for bit, side in enumerate(_SIDES) if side not in IMAGES_BESIDE)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageFolder(PackInput):
    """Images at any depth, each with a caption file of the same name beside it; the endings may be in capitals.

    A ``.mask.png`` file of the same name, the mask of the loss, is packed with its image, and so is a ``.source.jpg`` (or of any
    other image format), the image that an instruction starts from.

    Attributes:
        folder: Folder of the images.
        names: Paths of the images, relative to ``folder``.
        sides: Files beside each image, one bit for each entry of ``_SIDES``, uint64 (N,).
        template: Makes the captions in place of the files beside the images; None to read these.
        fallback: Caption of images without a caption file; None if there are none.
    """

    captions_are_beside = True

    folder: Path
    names: SampleNames
    sides: NDArray[np.uint64]
    template: CaptionTemplate | None = None
    fallback: str | None = None

    @classmethod
    def find(cls, source: PackSource) -> ImageFolder | None:
        """The images of a folder, unless a metadata file lists them with their captions."""
        if not source.has_images or (source.metadata and source.template is None):
            return None
        kinds = CAPTIONS if source.caption_extension is None else (source.caption_extension,)
        return cls.scan(source.path, source.out, source.template, source.fallback, kinds)

    @classmethod
    def scan(
        cls,
        folder: Path,
        skip: Path | None = None,
        template: CaptionTemplate | None = None,
        fallback: str | None = None,
        kinds: Sequence[str] = CAPTIONS,
    ) -> ImageFolder:
        """All images below a folder, sorted by path, with captions beside them or by a template.

        Args:
            folder: Folder to list.
            skip: Folder to skip. Defaults to None.
            template: Makes the captions. Defaults to None: they are read.
            fallback: Caption of images without a caption file. Defaults to None: these are bad.
            kinds: Endings of the files that hold captions, a part of :data:`CAPTIONS`, which is the default.

        Raises:
            UserError: If a folder cannot be read.
        """
        scan = _Scan(folder, template, fallback, kinds if template is None else ())
        names = SampleNames.of(show_planning(scan.good_files(skip)))
        return cls(
            folder=folder,
            names=names,
            sides=np.array(scan.sides, np.uint64),
            sizes=np.array(scan.sizes, np.int64),
            fingerprint=scan.digest.hexdigest(),
            bad=tuple(scan.bad),
            skipped=tuple(scan.all_skipped()),
            notes=tuple(scan.notes(len(names))),
            template=template,
            fallback=fallback,
        )

    @property
    def may_be_empty(self) -> bool:
        return self.fallback == ""

    def name(self, sample: int) -> str:
        return self.names[sample]

    def key(self, sample: int) -> str:
        return self.names.key(sample)

    def members(self, sample: int) -> dict[str, bytes]:
        paths = _paths(self.folder, self.names[sample], int(self.sides[sample]))
        members = {extension: read_file(path, extension) for extension, path in paths.items()}
        if self.template is None:
            return members if members.keys() & CAPTIONS else members | {"txt": (self.fallback or "").encode()}
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


class _Scan:
    """What is found in a folder.

    Args:
        folder: Folder to list.
        template: Makes the captions; None if they are read.
        fallback: Caption of images without a caption file; None if these are bad.
        kinds: Endings of the files that hold captions; none if captions are made.

    Attributes:
        sizes: Size of each good image's sample in a tar, in bytes.
        sides: Files beside each good image, as bits.
        digest: Fingerprint of the good images and the files beside them.
        bad: Images that cannot be packed.
    """

    def __init__(
        self, folder: Path, template: CaptionTemplate | None, fallback: str | None, kinds: Sequence[str]
    ) -> None:
        self._folder = folder
        self._template = template
        self._fallback = fallback
        self._kinds = kinds
        self.sizes, self.sides = array("q"), array("Q")
        self.digest = hashlib.sha256()
        self.bad: list[BadFile] = []
        self._skipped: list[BadFile] = []
        self._unread: list[str] = []
        self._bare: list[str] = []

    def good_files(self, skip: Path | None) -> Iterator[str]:
        """Yield the images that can be packed, except those below a folder."""
        for file, siblings in walk_files(self._folder, skip):
            if is_beside_another(file, siblings):
                continue
            if not image_extension(file):
                self._skip(file, siblings)
                continue
            try:
                self._add(file, siblings)
            except BadSampleError as error:
                self.bad.append(BadFile(file, str(error)))
            else:
                yield file

    def all_skipped(self) -> list[BadFile]:
        """Files that look like captions and are not read."""
        if not self._unread:
            return self._skipped
        unread = BadFile(self._unread[0], "is not read: captions are made from names", len(self._unread))
        return [*self._skipped, unread]

    def notes(self, count: int) -> list[str]:
        """Remarks on the folder, of whose images ``count`` are packed."""
        if not self._bare:
            return []
        first = f"{len(self._bare):,} of {count:,} images have no caption file, first {self._bare[0]}"
        return [f"{first}: they get {_quoted(self._fallback)}"]

    def _skip(self, file: str, siblings: Set[str]) -> None:
        """Take note of a file that is no image, if it looks like a caption that is not read."""
        if not self._kinds:
            self._unread += [file] if extension_of(file) in CAPTIONS else []
        elif reason := _why_no_caption(self._folder, file, siblings, self._kinds):
            self._skipped.append(BadFile(file, reason))

    def _add(self, file: str, siblings: Set[str]) -> None:
        """Add an image.

        Raises:
            BadSampleError: If it cannot be packed.
        """
        bits = _find_sides(file, siblings, self._kinds)
        size, stamp = stat_files(_paths(self._folder, file, bits))
        if self._template is not None:
            size += packed_size(len(self._template.caption(file, self._folder)))
        elif not bits & _CAPTION_BITS:
            size += packed_size(len(_checked(self._fallback, self._kinds, self._folder / file).encode()))
            self._bare.append(file)
        self.sizes.append(size)
        self.sides.append(bits)
        self.digest.update(f"{file}\t{stamp}\n".encode("utf-8", "surrogateescape"))


def read_file(path: Path, extension: str) -> bytes:
    """Read a file of a sample.

    Args:
        path: Path of the file.
        extension: Its extension in the shard; a file that is not the sample's image is named in the error.

    Raises:
        BadSampleError: If the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, extension, error) from error


def _unreadable(path: Path, extension: str, error: OSError) -> BadSampleError:
    named = "" if extension in IMAGE_FILES else f"{path.name} "
    return BadSampleError(f"{named}cannot be read ({error.strerror}){other_spelling(path)}")


def stat_files(paths: dict[str, Path]) -> tuple[int, str]:
    """Size of a sample's files in a tar, and a fingerprint that changes when a file changes.

    Args:
        paths: Paths of the files by extension.

    Raises:
        BadSampleError: If a file is missing or is a pipe or a device, or an image is empty.
    """
    sizes, stamps = [], []
    for extension, path in paths.items():
        try:
            stat = check_regular(path)
        except OSError as error:
            raise _unreadable(path, extension, error) from error
        except UserError as error:
            raise BadSampleError(str(error)) from error
        if stat.st_size == 0 and extension in IMAGE_FILES:
            raise BadSampleError("the image is empty")
        sizes.append(stat.st_size)
        stamps.append(f"{extension} {stat.st_size} {stat.st_mtime_ns}")
    return packed_size(*sizes), " ".join(stamps)


def _find_sides(file: str, siblings: Set[str], kinds: Sequence[str]) -> int:
    """The files beside an image, as bits: its mask, its source, and captions of some kinds.

    Raises:
        BadSampleError: If the image is named like a mask or a source and has no caption.
    """
    image = PurePosixPath(file)
    found = {
        side.lower(): bit
        for bit, side in reversed(list(enumerate(_SIDES)))  # the first spelling stays
        if side.lower() in (*kinds, *IMAGES_BESIDE) and image.with_suffix(f".{side}").name in siblings
    }
    if "txt" in found:
        found.pop("caption", None)
    bits = sum(1 << bit for bit in found.values())
    if not bits & _CAPTION_BITS and (reason := why_no_image(file)):
        raise BadSampleError(reason)
    return bits


def _checked(fallback: str | None, kinds: Sequence[str], image: Path) -> str:
    if fallback is None:
        hint = next(filter(None, (other_spelling(image.with_suffix(f".{kind}")) for kind in kinds)), "")
        endings = " or ".join(f".{kind}" for kind in kinds if kind != "caption" or kinds == ("caption",))
        raise BadSampleError(f"has no caption (a {endings} file of the same name){hint}")
    return fallback


def _quoted(fallback: str | None) -> str:
    return f"{fallback!r}" if fallback else "no words of their own"


def _why_no_caption(folder: Path, file: str, siblings: Set[str], kinds: Sequence[str]) -> str:
    """Why a file that looks like a caption is none; empty if it is one, or another kind of file."""
    side = extension_of(file)
    if side not in CAPTIONS:
        return ""
    if side not in kinds:
        return f"is not read: captions are in .{kinds[0]} files"
    stem, _, spelled = file.rpartition("/")[2].rpartition(".")
    if not any(images_named(stem, siblings)):
        images = (folder / file).parent / f"{stem}.png", (folder / file).parent / f"{stem}.jpg"
        return "is no caption of an image beside it" + next(filter(None, map(other_spelling, images)), "")
    if side == "caption" and "txt" in kinds and f"{stem}.txt" in siblings:
        return f"is beside {stem}.txt, which is read"
    spellings = [each for each in _SIDES if each.lower() == side]
    read = next((each for each in spellings if f"{stem}.{each}" in siblings), None)
    if spelled == read:
        return ""
    return f"has the ending .{spelled}; write .{side}" if read is None else f"is beside {stem}.{read}, which is read"


def _paths(folder: Path, file: str, bits: int) -> dict[str, Path]:
    image = folder / file
    found = [side for bit, side in enumerate(_SIDES) if bits >> bit & 1]
    sides = {MEMBERS.get(side, side.lower()): image.with_suffix(f".{side}") for side in found}
    return {image_extension(file): image, **sides}
