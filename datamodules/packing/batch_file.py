"""Columnar files that pyarrow reads in batches of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.errors import UserError
from lit_lora.files import check_regular


@dataclass(frozen=True)
class BatchFile(ABC):
    """A columnar file, of which only a few rows are in memory at a time.

    Attributes:
        path: Path of the file.

    Raises:
        UserError: If it is a pipe or a device.
    """

    path: Path

    def __post_init__(self) -> None:
        with suppress(OSError):  # opening it says so
            check_regular(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)  # open files cannot be pickled

    @property
    @abstractmethod
    def schema(self) -> Any:
        """Names and types of the columns, as a ``pyarrow.Schema``."""

    @abstractmethod
    def row_sizes(self, columns: Sequence[str]) -> NDArray[np.int64]:
        """Approximate size of each row in these columns in bytes, int64 (rows,)."""

    @abstractmethod
    def row_blocks(self) -> NDArray[np.int64] | None:
        """Number of the block with which each row is read, ascending, int64 (rows,); None if rows are read one by one."""

    @abstractmethod
    def values(self, column: str) -> Iterator[list[Any]]:
        """Yield the values of one column, in lists; ``a.b`` is the field b of the column a."""

    @abstractmethod
    def batch_with(self, row: int, columns: Sequence[str]) -> tuple[Any, int]:
        """A batch that contains a row, and the number of its first row; fast for rows in ascending order."""


def import_arrow(name: str = "pyarrow") -> Any:
    """Import a module of pyarrow.

    Raises:
        UserError: If pyarrow is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError('Parquet and Arrow files need pyarrow; pip install "lit_lora[parquet]"') from error
