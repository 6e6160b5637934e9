"""Rows of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.packing.batch_file import BatchFile, import_arrow
from lit_lora.errors import UserError
from lit_lora.visible import visible

_ROWS = 256  # per batch, about 40 MB with images in them


class ParquetFile(BatchFile):
    """A Parquet file. It can be read only from the start of a row group, so random access to rows is slow."""

    @property
    def schema(self) -> Any:
        return self._file.schema_arrow

    def row_sizes(self, columns: Sequence[str]) -> NDArray[np.int64]:
        """Mean size of the rows in each row's row group, from the file's footer."""
        means = [np.zeros(0, np.int64)]
        for number in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(number)
            chunks = [group.column(place) for place in range(group.num_columns)]
            wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
            total = sum(chunk.total_uncompressed_size for chunk in wanted)
            means.append(np.full(group.num_rows, total // max(group.num_rows, 1), np.int64))
        return np.concatenate(means)

    def row_blocks(self) -> NDArray[np.int64]:
        blocks: list[NDArray[np.int64]] = [np.full(1, -1, np.int64)]
        for number in range(self._file.num_row_groups):
            rows = np.arange(self._file.metadata.row_group(number).num_rows)
            blocks.append(blocks[-1][-1:].max(initial=-1) + 1 + rows // _ROWS)
        return np.concatenate(blocks[1:]) if len(blocks) > 1 else np.zeros(0, np.int64)

    def values(self, column: str) -> Iterator[list[Any]]:
        for batch in self._file.iter_batches(batch_size=1 << 14, columns=[column]):
            values = batch.column(0)
            for field in column.split(".")[1:]:
                values = values.field(field)
            yield values.to_pylist()

    def batch_with(self, row: int, columns: Sequence[str]) -> tuple[Any, int]:
        return self._cursor.find(row, columns)

    @cached_property
    def _file(self) -> Any:
        parquet, arrow = import_arrow("pyarrow.parquet"), import_arrow()
        try:
            # With other settings pyarrow would read whole row groups at once, which may exceed the memory.
            return parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        except (OSError, arrow.ArrowException) as error:
            raise UserError(
                f"cannot read {visible(self.path)} as Parquet ({visible(error)}); name another file"
            ) from error

    @cached_property
    def _cursor(self) -> _Cursor:
        return _Cursor(self._file)


class _Cursor:
    """The position up to which a row group has been read."""

    def __init__(self, file: Any) -> None:
        counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *counts])
        self._file = file
        self._columns: list[str] = []
        self._group = -1
        self._first = 0
        self._batch: Any = None
        self._rest: Iterator[Any] = iter(())

    def find(self, row: int, columns: Sequence[str]) -> tuple[Any, int]:
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        if group != self._group or row < self._first or list(columns) != self._columns:
            self._columns = list(columns)
            self._rest = self._file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=self._columns)
            self._first, self._batch = int(self._starts[group]), self._read()
            self._group = group
        while row >= self._first + self._batch.num_rows:
            following = self._read()
            self._first, self._batch = self._first + self._batch.num_rows, following
        return self._batch, self._first

    def _read(self) -> Any:
        place, self._group = self._group, -1  # after an error the group is read from its start
        batch = next(self._rest, None)
        if batch is None:
            raise OSError("the row group has fewer rows than the file says")
        self._group = place
        return batch
