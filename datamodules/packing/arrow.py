"""Rows of Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.packing.batch_file import BatchFile, import_arrow
from lit_lora.errors import UserError
from lit_lora.visible import visible


class ArrowFile(BatchFile):
    """A memory-mapped Arrow file, in the stream format that ``datasets.Dataset.save_to_disk`` writes."""

    @property
    def schema(self) -> Any:
        return self._table.schema

    def row_sizes(self, columns: Sequence[str]) -> NDArray[np.int64]:
        """Mean size of the rows in each row's batch."""
        means = [
            np.full(batch.num_rows, batch.select(list(columns)).nbytes // max(batch.num_rows, 1), np.int64)
            for batch in self._batches
        ]
        return np.concatenate([np.zeros(0, np.int64), *means])

    def row_blocks(self) -> None:
        return None

    def values(self, column: str) -> Iterator[list[Any]]:
        name, *fields = column.split(".")
        for batch in self._batches:
            values = batch.column(name)
            for field in fields:
                values = values.field(field)
            yield values.to_pylist()

    def batch_with(self, row: int, columns: Sequence[str]) -> tuple[Any, int]:
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._batches[number].select(list(columns)), int(self._starts[number])

    @cached_property
    def _table(self) -> Any:
        arrow = import_arrow()
        try:
            return arrow.ipc.open_stream(arrow.memory_map(str(self.path))).read_all()
        except (OSError, arrow.ArrowException) as error:
            raise UserError(
                f"cannot read {visible(self.path)} as an Arrow stream ({visible(error)}); name another file"
            ) from error

    @cached_property
    def _batches(self) -> list[Any]:
        return [batch for batch in self._table.to_batches() if batch.num_rows]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(batch.num_rows for batch in self._batches)])
