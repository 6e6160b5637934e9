"""Files of columns that pyarrow reads in batches of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.errors import UserError


@dataclass(frozen=True)
class BatchFile(ABC):
    """A file of columns, of which only a few rows are in memory at a time.

    Attributes:
        path: The file.
    """

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)  # what is open cannot go to another process

    @property
    @abstractmethod
    def schema(self) -> Any:
        """Names and types of the columns, a ``pyarrow.Schema``."""

    @abstractmethod
    def row_sizes(self, columns: Sequence[str]) -> NDArray[np.int64]:
        """Approximate bytes of each row in these columns, int64 (rows,)."""

    @abstractmethod
    def row_blocks(self) -> NDArray[np.int64] | None:
        """Number of the block in which each row is read, int64 (rows,) ascending; None if each row can be read by itself."""

    @abstractmethod
    def values(self, column: str) -> Iterator[list[Any]]:
        """All rows of one column, a piece at a time. ``a.b`` is the field b of the column a."""

    @abstractmethod
    def batch_with(self, row: int, columns: Sequence[str]) -> tuple[Any, int]:
        """A batch that holds this row, and the number of its first row. Quick for rows in ascending order."""


def import_arrow(name: str = "pyarrow") -> Any:
    """A module of pyarrow.

    Raises:
        UserError: If pyarrow is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError('parquet and arrow files need pyarrow; pip install "lit_lora[parquet]"') from error
