"""Packing of editing pairs from two folders: targets in one, sources of the same names in the other."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.packing.image_folder import read_file, stat_files
from lit_lora.datamodules.packing.image_formats import image_extension
from lit_lora.datamodules.packing.images_beside import check_source, source_member
from lit_lora.datamodules.packing.input import PackInput
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.datamodules.packing.sample_names import SampleNames
from lit_lora.datamodules.packing.source import PackSource
from lit_lora.datamodules.packing.unknown_files import UnknownFiles
from lit_lora.datamodules.packing.walk import OtherSplits, walk_files
from lit_lora.errors import UserError
from lit_lora.visible import visible


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedImages(PackInput):
    """Images of another input, the targets, each with the source image of the same name in another folder.

    Attributes:
        targets: The targets with their captions.
        folder: Folder of the sources.
        files: Path of each sample's source, relative to ``folder``.
    """

    targets: PackInput
    folder: Path
    files: SampleNames

    @classmethod
    def find(cls, source: PackSource) -> None:
        """None: pairs are made of another input, by :meth:`of`."""

    @classmethod
    def of(cls, targets: PackInput, folder: Path) -> PairedImages:
        """Pair images with those of another folder by their paths without endings.

        Images without a source, or with several, are bad; sources without an image are left out and named.

        Args:
            targets: The targets, which are files of images.
            folder: Folder of the sources.

        Raises:
            UserError: If the folder cannot be read.
        """
        found, unknown = _sources(folder)
        bad: list[BadFile] = []
        used = {_stem(entry.file) for entry in targets.bad}
        numbers, sizes = array("q"), array("q")
        digest = hashlib.sha256(targets.fingerprint.encode())

        def good_sources() -> Iterator[str]:
            for sample in range(len(targets)):
                name = targets.name(sample)
                used.add(_stem(name))
                try:
                    file = _only(found.get(_stem(name), []), name, folder)
                    size, stamp = stat_files({image_extension(file): folder / file})
                except BadSampleError as error:
                    bad.append(BadFile(name, str(error)))
                    continue
                numbers.append(sample)
                sizes.append(size)
                digest.update(f"{file}\t{stamp}\n".encode("utf-8", "surrogateescape"))
                yield file

        files = SampleNames.of(good_sources())
        kept = np.array(numbers, np.int64)
        alone = [file for stem, files in found.items() if stem not in used for file in files]
        reason = "is a source to which no image belongs; add the image and its caption, or remove it"
        skipped = [BadFile(str(folder / file), reason) for file in alone]
        return cls(
            targets=targets.select(kept),
            folder=folder,
            files=files,
            sizes=targets.sizes[kept] + np.array(sizes, np.int64),
            fingerprint=digest.hexdigest(),
            blocks=None if targets.blocks is None else targets.blocks[kept],
            bad=(*targets.bad, *bad),
            skipped=(*targets.skipped, *skipped, *unknown),
            notes=targets.notes,
        )

    @property
    def may_be_empty(self) -> bool:
        return self.targets.may_be_empty

    def name(self, sample: int) -> str:
        return self.targets.name(sample)

    def key(self, sample: int) -> str:
        return self.targets.key(sample)

    def members(self, sample: int) -> dict[str, bytes]:
        file = self.files[sample]
        members = self.targets.members(sample)
        check_source(str(self.folder / file), members)
        return {**members, source_member(file): read_file(self.folder / file, source_member(file))}

    def select(self, samples: NDArray[np.int64]) -> PairedImages:
        return replace(
            self,
            targets=self.targets.select(samples),
            files=self.files.select(samples),
            sizes=self.sizes[samples],
            blocks=None,
            bad=(),
            skipped=(),
        )


def check_sources(folder: Path, targets: Path, out: Path) -> None:
    """Check that a folder of sources is apart from the images and the output.

    Raises:
        UserError: If it does not exist, or one of the folders contains another.
    """
    if not folder.is_dir():
        raise UserError(f"sources={visible(folder)} is no folder; name the folder of the source images")
    if not targets.is_dir():
        raise UserError(
            f"sources={visible(folder)} belong to a folder of images, and {visible(targets)} is none; name the column of the "
            "sources with source_column"
        )
    for other in (targets, out):
        here, there = folder.resolve(), other.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise UserError(
                f"sources={visible(folder)} and {visible(other)} contain one another; keep them in folders side by side"
            )


def _sources(folder: Path) -> tuple[dict[str, list[str]], list[BadFile]]:
    """The images of a folder by their paths without endings, and the other files that are left out."""
    found: dict[str, list[str]] = {}
    others, unknown = OtherSplits(), UnknownFiles()
    for file, _ in walk_files(folder, others=others):
        if image_extension(file):
            found.setdefault(_stem(file), []).append(file)
        else:
            unknown.add(file)
    splits = [
        BadFile(f"{folder / name}/", "is another split than train", count) for name, count in others.folders.items()
    ]
    rest = [replace(entry, file=str(folder / entry.file)) for entry in unknown.entries().values()]
    return found, [*splits, *rest]


def _only(files: list[str], name: str, folder: Path) -> str:
    """The only source of an image."""
    if not files:
        raise BadSampleError(
            f"has no source, an image {visible(Path(name).stem)}.* at the same place in {visible(folder)}"
        )
    if len(files) > 1:
        raise BadSampleError(f"has {len(files)} sources, {' and '.join(map(visible, files))}; remove all but one")
    return files[0]


def _stem(file: str) -> str:
    head, slash, name = file.rpartition("/")
    return f"{head}{slash}{name.rpartition('.')[0] or name}"
