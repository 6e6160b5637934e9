"""Packing of the rows of Parquet and Arrow files."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.indexing.image_format import image_format
from lit_lora.datamodules.packing.batch_file import BatchFile, import_arrow
from lit_lora.datamodules.packing.image_folder import read_file, stat_files
from lit_lora.datamodules.packing.image_formats import ANY_IMAGE, NOT_AN_IMAGE, image_extension
from lit_lora.datamodules.packing.images_beside import check_source, images_beside, source_member
from lit_lora.datamodules.packing.input import TAR_BLOCK, PackInput, show_planning
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.datamodules.packing.parquet import ParquetFile
from lit_lora.datamodules.packing.sample_names import SampleNames
from lit_lora.datamodules.packing.table_columns import TableColumns
from lit_lora.errors import UserError
from lit_lora.visible import visible

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource
    from lit_lora.datamodules.packing.walk import OtherSplits


@dataclass(frozen=True, eq=False, kw_only=True)
class ColumnTable(PackInput):
    """Rows with an image or its path, and a caption.

    Sizes of images inside the files are estimated, since planning does not read them.

    Attributes:
        folder: Folder to which names of files are relative.
        files: The files, which have the same columns.
        columns: Roles of the columns.
        read: Names of the columns that are packed.
        names: Paths of the images, relative to ``folder`` or absolute; None if the files contain the images.
        row: Number of each sample's row, counted over all files, int64 (N,).
        first_row: Number of each file's first row, and the total number of rows, int64 (files + 1,).
        sources: Paths of all source images that the rows name, relative to ``folder`` or absolute; None if they name none.
    """

    extensions = ("parquet",)

    folder: Path
    files: tuple[BatchFile, ...]
    columns: TableColumns
    read: tuple[str, ...]
    names: SampleNames | None
    row: NDArray[np.int64]
    first_row: NDArray[np.int64]
    sources: SampleNames | None = None

    @classmethod
    def find(cls, source: PackSource) -> ColumnTable | None:
        """The rows of Parquet files, unless a metadata file lists the images of the folder."""
        files = [] if source.metadata else [ParquetFile(path) for path in source.files.get("parquet", ())]
        return cls.of(source.folder, files, **source.column_options) if files else None

    @classmethod
    def of(
        cls,
        folder: Path,
        files: Sequence[BatchFile],
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        source_column: str | None = None,
        caption_key: str = "caption",
        metadata: bool = False,
        others: OtherSplits | None = None,
    ) -> ColumnTable:
        """All rows of files that have the same columns.

        Args:
            folder: Folder to which names of files are relative; it contains all ``files``.
            files: The files; paths of images in a file are relative to its folder.
            image_column: Column of images (bytes, or a struct with bytes and path) or of their paths. Defaults to None: a column
                with the struct type, or else with a usual name.
            caption_column: Column of captions. Defaults to None: a column with a usual name.
            source_column: Column of source images, or of their paths. Defaults to None: one with a usual name, if there is one.
            caption_key: Key in the ``.json`` member for several captions of one image. Defaults to "caption".
            metadata: Whether these are metadata files. Defaults to False.
            others: Folders of other splits, whose images are left out. Defaults to None.

        Raises:
            UserError: If pyarrow is not installed, or a file cannot be read or has no such column.
        """
        schema = files[0].schema
        columns = TableColumns.choose(
            files[0].path,
            schema.names,
            image_column,
            caption_column,
            caption_key,
            source_column,
            () if metadata else [field.name for field in schema if _has_bytes(field.type)],
            metadata,
        )
        read = _columns_to_read(files, columns)
        sizes = [file.row_sizes(read) for file in files]
        first_row = np.cumsum([0, *(len(rows) for rows in sizes)], dtype=np.int64)
        if not first_row[-1]:
            raise UserError(f"{visible(files[0].path)} has no rows; name another file")
        every = cls(
            folder=folder,
            files=tuple(files),
            columns=columns,
            read=read,
            names=None,
            row=np.arange(first_row[-1]),
            first_row=first_row,
            sizes=np.concatenate(sizes) + 3 * TAR_BLOCK,
            fingerprint=hashlib.sha256("\n".join(_stamp(folder, file) for file in files).encode()).hexdigest(),
            blocks=_number_blocks(files),
            notes=tuple(_notes(files, read)),
        )
        path = _path_column(files, columns.image, "image_column")
        source = columns.source and _path_column(files, columns.source, "source_column")
        return every if path is None else every._with_paths(path, source, others)

    def read_files(self) -> list[Path]:
        return [file.path for file in self.files]

    @property
    def packs_images_beside(self) -> bool:
        return self.names is not None

    def image_names(self) -> Iterator[str]:
        if self.names is not None:
            yield from (self.names[sample] for sample in range(len(self)))
            yield from (file.file for file in self.bad)
        if self.sources is not None:
            yield from (self.sources[source] for source in range(len(self.sources)))

    def name(self, sample: int) -> str:
        if self.names is not None:
            return self.names[sample]
        file, row = self._place(sample)
        return f"{self.files[file].path.relative_to(self.folder).as_posix()}, row {row}"

    def key(self, sample: int) -> str:
        return f"{self.row[sample]:09}" if self.names is None else self.names.key(sample)

    def members(self, sample: int) -> dict[str, bytes]:
        file, number = self._place(sample)
        try:
            batch, first = self.files[file].batch_with(number, self.read)
            row = batch.slice(number - first, 1).to_pylist()[0]
        except (OSError, import_arrow().ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise BadSampleError(f"cannot be read ({reason})") from error
        folder = self.files[file].path.parent
        members = {**_image(folder, row[self.columns.image]), **self.columns.texts(row)}
        return members if self.columns.source is None else members | _source(folder, row[self.columns.source], members)

    def select(self, samples: NDArray[np.int64]) -> ColumnTable:
        return replace(
            self,
            names=None if self.names is None else self.names.select(samples),
            row=self.row[samples],
            sizes=self.sizes[samples],
            blocks=None,
            bad=(),
            skipped=(),
            sources=None,
        )

    def _place(self, sample: int) -> tuple[int, int]:
        """Number of a sample's file, and of its row in that file."""
        file = int(np.searchsorted(self.first_row, self.row[sample], "right")) - 1
        return file, int(self.row[sample] - self.first_row[file])

    def _with_paths(self, column: str, source: str | None, others: OtherSplits | None) -> ColumnTable:
        """The rows whose image files exist, and those of their sources, with their names and sizes."""
        sources: list[str] = []
        bad: list[BadFile] = []
        rows, sizes = array("q"), array("q")
        digest = hashlib.sha256(self.fingerprint.encode())

        def good_images() -> Iterator[str]:
            starts = itertools.repeat(("", "")) if source is None else self._paths(source)
            for row, ((name, path), (_, start)) in enumerate(zip(self._paths(column), starts, strict=False)):
                sources.extend([start] if start else [])
                if others is not None and others.contain(path):
                    continue
                try:
                    size, stamp = _stat_image(self.folder, path, start, source is not None)
                except BadSampleError as error:
                    bad.append(BadFile(path or name, str(error)))
                    continue
                rows.append(row)
                sizes.append(size)
                digest.update(f"{path}\t{stamp}\n".encode("utf-8", "surrogateescape"))
                yield path

        names = SampleNames.of(show_planning(good_images()))
        row = np.array(rows, np.int64)
        return replace(
            self,
            names=names,
            row=row,
            sizes=self.sizes[row] + np.array(sizes, np.int64),
            blocks=None if self.blocks is None else self.blocks[row],
            fingerprint=digest.hexdigest(),
            bad=tuple(bad),
            sources=SampleNames.of(sources),
        )

    def _paths(self, column: str) -> Iterator[tuple[str, str]]:
        """Yield the name of each row for messages, and the path of its image or an empty string."""
        for file in self.files:
            prefix = file.path.parent.relative_to(self.folder)
            row = 0
            for paths in file.values(column):
                for path in paths:
                    yield f"{file.path.name}, row {row}", (prefix / path).as_posix() if path else ""
                    row += 1


def _columns_to_read(files: Sequence[BatchFile], columns: TableColumns) -> tuple[str, ...]:
    """Names of the columns that are packed, which every file must have."""
    needed = (columns.image, columns.source, *columns.captions)
    read = tuple(field.name for field in files[0].schema if field.name in needed or _is_packed(field.type))
    for file in files[1:]:
        if missing := [name for name in read if name not in file.schema.names]:
            raise UserError(
                f"{visible(file.path)} lacks the column {missing[0]!r} of {visible(files[0].path)}; pack these files separately"
            )
    return read


def _notes(files: Sequence[BatchFile], read: Sequence[str]) -> Iterator[str]:
    """What is not packed of the columns."""
    names = files[0].schema.names
    if unpacked := [name for name in names if name not in read]:
        yield f"the columns {', '.join(map(visible, unpacked))} are neither texts nor numbers and not packed"
    for file in files[1:]:
        if others := [name for name in file.schema.names if name not in names]:
            yield (
                f"the columns {', '.join(map(visible, others))} of {visible(file.path)} are not packed, since "
                f"{visible(files[0].path)} lacks them; pack these files separately to keep them"
            )
            return


def _has_bytes(kind: Any) -> bool:
    types = import_arrow().types
    return types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_packed(kind: Any) -> bool:
    """Whether a column is packed into ``.json``: numbers and texts, but not embeddings or nested values."""
    types = import_arrow().types
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind)
    is_text = types.is_string(kind) or types.is_large_string(kind)
    return is_text or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)


def _path_column(files: Sequence[BatchFile], image: str, option: str) -> str | None:
    """The column of image paths; None if the files contain the images."""
    kind = files[0].schema.field(image).type
    types = import_arrow().types
    if types.is_binary(kind) or types.is_large_binary(kind):
        return None
    if types.is_string(kind) or types.is_large_string(kind):
        return image
    if not _has_bytes(kind):
        raise UserError(
            f"{visible(files[0].path)}: the column {image!r} holds {kind}, not images or paths; set {option} to"
            " another column"
        )
    if kind.get_field_index("path") < 0:
        return None
    with_rows = next(file for file in files if len(file.row_sizes([image])))
    batch, _ = with_rows.batch_with(0, [image])
    first = batch.column(0)[0].as_py()
    return f"{image}.path" if first is not None and first["bytes"] is None else None


def _image(folder: Path, value: Any) -> dict[str, bytes]:
    """The image of a row, from its bytes or its path, by extension."""
    if isinstance(value, dict):
        if value["bytes"] is not None:
            extension = image_extension(value.get("path") or "") or ANY_IMAGE
            return {image_format(value["bytes"]) or extension: value["bytes"]}
        value = value.get("path")
    if isinstance(value, bytes):
        return {image_format(value) or ANY_IMAGE: value}
    if isinstance(value, str):
        path = folder / value
        if not image_extension(path.name):
            raise BadSampleError(NOT_AN_IMAGE)
        paths = {image_extension(path.name): path, **images_beside(path)}
        return {end: read_file(path, end) for end, path in paths.items()}
    raise BadSampleError("has no image")


def _source(folder: Path, value: Any, members: Mapping[str, bytes]) -> dict[str, bytes]:
    """The source image of a row as a member beside others."""
    try:
        [(extension, data)] = ((end, data) for end, data in _image(folder, value).items() if "." not in end)
    except BadSampleError as error:
        raise BadSampleError(f"source image: {error}") from error
    check_source(f"source.{extension}", members)
    return {f"source.{extension}": data}


def _stat_image(folder: Path, path: str, source: str, has_source: bool) -> tuple[int, str]:
    """Size and stamp of the files of a row."""
    if not path or "\0" in path:
        raise BadSampleError("has no image")
    if not image_extension(path):
        raise BadSampleError(NOT_AN_IMAGE)
    paths = {image_extension(path): folder / path, **images_beside(folder / path)}
    if has_source:
        if not source or "\0" in source:
            raise BadSampleError("has no source image")
        check_source(source, paths)
        paths[source_member(source)] = folder / source
    return stat_files(paths)


def _stamp(folder: Path, file: BatchFile) -> str:
    stat = file.path.stat()
    return f"{file.path.relative_to(folder).as_posix()}\t{stat.st_size}\t{stat.st_mtime_ns}"


def _number_blocks(files: Sequence[BatchFile]) -> NDArray[np.int64] | None:
    numbered: list[NDArray[np.int64]] = []
    count = 0
    for file in files:
        blocks = file.row_blocks()
        if blocks is None:
            return None
        numbered.append(blocks + count)
        count += int(blocks.max(initial=-1)) + 1
    return np.concatenate(numbered)
