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
from lit_lora.datamodules.packing.images_beside import check_source, images_beside, source_member
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
        sources: Paths of all source images that the rows name, relative to ``folder`` or absolute; None in a part of the table.
    """

    extensions = ROW_EXTENSIONS

    folder: Path
    files: tuple[RowFile, ...]
    columns: tuple[TableColumns, ...]
    names: SampleNames
    file: NDArray[np.int32]
    start: NDArray[np.int64]
    sources: SampleNames | None

    @classmethod
    def find(cls, source: PackSource) -> ImageTable | None:
        """The rows of a text file, or of the metadata files in a folder of images."""
        paths = source.metadata_in(ROW_EXTENSIONS)
        if source.is_file:
            paths = [path for extension in ROW_EXTENSIONS for path in source.files.get(extension, ())]
        if not paths:
            return None
        return cls.read(source.folder, paths, others=source.others, **source.column_options)

    @classmethod
    def read(
        cls,
        folder: Path,
        paths: Sequence[Path],
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        source_column: str | None = None,
        caption_key: str = "caption",
        metadata: bool = False,
        others: OtherSplits = _NO_SPLITS,
    ) -> ImageTable:
        """Read the rows of text files, in order.

        Args:
            folder: Folder to which names of samples are relative; it contains all ``paths``.
            paths: Paths of the text files; paths of images in a file are relative to its folder.
            image_column: Column of paths. Defaults to None: a column with a usual name.
            caption_column: Column of captions, in the same way.
            source_column: Column of paths of source images. Defaults to None: one with a usual name, if there is one.
            caption_key: As in :class:`TableColumns`. Defaults to "caption".
            metadata: Whether these are metadata files, for which images outside of their folder are bad. Defaults to False.
            others: Folders of other splits, whose rows are left out. Defaults to none.

        Raises:
            UserError: If a file cannot be read or parsed, or has no such column.
        """
        files = tuple(map(RowFile.open, paths))
        choice: dict[str, Any] = {"image": image_column, "caption": caption_column, "source": source_column}
        choice |= {"caption_key": caption_key, "metadata": metadata}
        columns = tuple(TableColumns.choose(file.path, file.columns(), **choice) for file in files)
        bad: list[BadFile] = []
        sources: list[str] = []
        sizes, file_numbers, starts, digest = array("q"), array("i"), array("q"), hashlib.sha256()

        def good_images() -> Iterator[str]:
            for number, start, name, size, stamp in _good_rows(folder, files, columns, metadata, others, bad, sources):
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
            sources=SampleNames.of(sources),
        )

    def read_files(self) -> list[Path]:
        return [file.path for file in self.files]

    @property
    def packs_images_beside(self) -> bool:
        return True

    def image_names(self) -> Iterator[str]:
        yield from (self.names[sample] for sample in range(len(self)))
        yield from (file.file for file in self.bad)
        if self.sources is not None:
            yield from (self.sources[source] for source in range(len(self.sources)))

    def name(self, sample: int) -> str:
        return self.names[sample]

    def key(self, sample: int) -> str:
        return self.names.key(sample)

    def members(self, sample: int) -> dict[str, bytes]:
        image = self.folder / self.names[sample]
        number = self.file[sample]
        file, columns = self.files[number], self.columns[number]
        row = file.row(int(self.start[sample]))
        source = _source_of(row, columns.source, PurePosixPath(file.path.relative_to(self.folder)).parent, False)
        paths = _paths(self.folder, image, source)
        return {end: read_file(path, end) for end, path in paths.items()} | columns.texts(row)

    def select(self, samples: NDArray[np.int64]) -> ImageTable:
        return replace(
            self,
            names=self.names.select(samples),
            file=self.file[samples],
            start=self.start[samples],
            sizes=self.sizes[samples],
            bad=(),
            skipped=(),
            sources=None,
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
    sources: list[str],
) -> Iterator[tuple[int, int, str, int, str]]:
    """Yield number of a row's file, offset of the row, path, packed size and stamp of its image; append to the lists."""
    for number, prefix, start, name, row in _rows(folder, files):
        try:
            source = _source_of(row, columns[number].source, prefix, inside)
            sources += [source] if source else []
            name = (prefix / _image_path(row, columns[number].image, inside)).as_posix()
            if not others.contain(name):
                yield number, start, name, *_measure(_paths(folder, folder / name, source), columns[number].texts(row))
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


def _source_of(row: dict[str, Any], column: str | None, prefix: PurePosixPath, inside: bool) -> str:
    """Path of a row's source image, relative to the folder of all tables or absolute; empty if the table has none."""
    return (prefix / _image_path(row, column, inside)).as_posix() if column else ""


def _paths(folder: Path, image: Path, source: str) -> dict[str, Path]:
    """The files of a sample by the names of their members."""
    if not image_extension(image.name):
        raise BadSampleError(NOT_AN_IMAGE)
    beside = images_beside(image)
    if not source:
        return {image_extension(image.name): image, **beside}
    check_source(source, beside)
    return {image_extension(image.name): image, **beside, source_member(source): folder / source}


def _measure(paths: dict[str, Path], texts: dict[str, bytes]) -> tuple[int, str]:
    size, stamp = stat_files(paths)
    digest = hashlib.sha256(b"\0".join(texts.values())).hexdigest()
    return size + packed_size(*(len(text) for text in texts.values())), f"{stamp} {digest}"
