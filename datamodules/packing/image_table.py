"""Packing of images that text files list with their captions."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.packing.image_folder import read_file, stat_files
from lit_lora.datamodules.packing.image_formats import NOT_AN_IMAGE, image_extension
from lit_lora.datamodules.packing.images_beside import images_beside
from lit_lora.datamodules.packing.input import PackInput, packed_size, show_planning
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.datamodules.packing.row_file import ROW_EXTENSIONS, RowFile
from lit_lora.datamodules.packing.sample_names import SampleNames
from lit_lora.datamodules.packing.table_columns import TableColumns
from lit_lora.datamodules.packing.walk import OtherSplits

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource

_NO_SPLITS = OtherSplits()


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageTable(PackInput):
    """Rows of text files, each with the path of an image and a caption; mask and source of the image are packed with it.

    Attributes:
        folder: Folder to which relative paths refer.
        files: The text files.
        columns: Roles of the columns of each file.
        names: Paths of the images, relative to ``folder`` or absolute.
        file: Number of each sample's text file, int32 (N,).
        start: Offset of each sample's row in its file, in bytes, int64 (N,).
    """

    extensions = ROW_EXTENSIONS

    folder: Path
    files: tuple[RowFile, ...]
    columns: tuple[TableColumns, ...]
    names: SampleNames
    file: NDArray[np.int32]
    start: NDArray[np.int64]

    @classmethod
    def find(cls, source: PackSource) -> ImageTable | None:
        """The rows of a text file, or of the metadata files in a folder of images."""
        paths = source.metadata_in(ROW_EXTENSIONS)
        if source.is_file:
            paths = [path for extension in ROW_EXTENSIONS for path in source.files.get(extension, ())]
        if not paths:
            return None
        inside = bool(source.metadata)
        return cls.read(source.folder, paths, inside=inside, others=source.others, **source.column_options)

    @classmethod
    def read(
        cls,
        folder: Path,
        paths: Sequence[Path],
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        caption_key: str = "caption",
        inside: bool = False,
        others: OtherSplits = _NO_SPLITS,
    ) -> ImageTable:
        """Read the rows of text files, in order.

        Args:
            folder: Folder to which names of samples are relative; it contains all ``paths``.
            paths: Paths of the text files; paths of images in a file are relative to its folder.
            image_column: Column of paths. Defaults to None: a column with a usual name.
            caption_column: Column of captions, in the same way.
            caption_key: As in :class:`TableColumns`. Defaults to "caption".
            inside: Whether images outside the folder of their file are bad. Defaults to False.
            others: Folders of other splits, whose rows are left out. Defaults to none.

        Raises:
            UserError: If a file cannot be read or parsed, or has no such column.
        """
        files = tuple(map(RowFile.open, paths))
        choice = (image_column, caption_column, caption_key)
        columns = tuple(TableColumns.choose(file.path, file.columns(), *choice) for file in files)
        bad: list[BadFile] = []
        sizes, file_numbers, starts, digest = array("q"), array("i"), array("q"), hashlib.sha256()

        def good_images() -> Iterator[str]:
            for number, start, name, size, stamp in _good_rows(folder, files, columns, inside, others, bad):
                sizes.append(size)
                file_numbers.append(number)
                starts.append(start)
                digest.update(f"{name}\t{stamp}\n".encode("utf-8", "surrogateescape"))
                yield name

        names = SampleNames.of(show_planning(good_images()))  # fills the columns
        return cls(
            folder=folder,
            files=files,
            columns=columns,
            names=names,
            file=np.array(file_numbers, np.int32),
            start=np.array(starts, np.int64),
            sizes=np.array(sizes, np.int64),
            fingerprint=digest.hexdigest(),
            bad=tuple(bad),
        )

    def read_files(self) -> list[Path]:
        return [file.path for file in self.files]

    @property
    def packs_images_beside(self) -> bool:
        return True

    def image_names(self) -> Iterator[str]:
        yield from (self.names[sample] for sample in range(len(self)))
        yield from (file.file for file in self.bad)

    def name(self, sample: int) -> str:
        return self.names[sample]

    def key(self, sample: int) -> str:
        return self.names.key(sample)

    def members(self, sample: int) -> dict[str, bytes]:
        image = self.folder / self.names[sample]
        number = self.file[sample]
        row = self.files[number].row(int(self.start[sample]))
        paths = {image_extension(image.name): image, **images_beside(image)}
        return {end: read_file(path) for end, path in paths.items()} | self.columns[number].texts(row)

    def select(self, samples: NDArray[np.int64]) -> ImageTable:
        return replace(
            self,
            names=self.names.select(samples),
            file=self.file[samples],
            start=self.start[samples],
            sizes=self.sizes[samples],
            bad=(),
            skipped=(),
        )


def _rows(folder: Path, files: Sequence[RowFile]) -> Iterator[tuple[int, PurePosixPath, int, str, dict[str, Any]]]:
    """Yield number and folder of a row's file, offset of the row in bytes, its name for messages, and its values."""
    for number, file in enumerate(files):
        path = PurePosixPath(file.path.relative_to(folder))
        for start, line, row in file.rows():
            yield number, path.parent, start, f"{path}, line {line}", row


def _good_rows(
    folder: Path,
    files: Sequence[RowFile],
    columns: Sequence[TableColumns],
    inside: bool,
    others: OtherSplits,
    bad: list[BadFile],
) -> Iterator[tuple[int, int, str, int, str]]:
    """Yield number of a row's file, offset of the row, path, packed size and stamp of its image; append to ``bad``."""
    for number, prefix, start, name, row in _rows(folder, files):
        try:
            name = (prefix / _image_path(row, columns[number].image, inside)).as_posix()
            if not others.contain(name):
                yield number, start, name, *_measure(folder / name, columns[number].texts(row))
        except BadSampleError as error:
            bad.append(BadFile(name, str(error)))


def _image_path(row: dict[str, Any], column: str, inside: bool) -> PurePosixPath:
    image = row.get(column)
    if not isinstance(image, str) or not image or "\0" in image:
        raise BadSampleError(f"the column {column} has no path of an image; correct the line")
    if "://" in image:
        raise BadSampleError(f"{image} is a URL; download the images first, for example with img2dataset")
    path = PurePosixPath(image)
    if inside and (path.is_absolute() or ".." in path.parts):
        raise BadSampleError(f"{image} is outside the folder of the table; move it there")
    return path


def _measure(image: Path, texts: dict[str, bytes]) -> tuple[int, str]:
    if not image_extension(image.name):
        raise BadSampleError(NOT_AN_IMAGE)
    size, stamp = stat_files({image_extension(image.name): image, **images_beside(image)})
    digest = hashlib.sha256(b"\0".join(texts.values())).hexdigest()
    return size + packed_size(*(len(text) for text in texts.values())), f"{stamp} {digest}"
