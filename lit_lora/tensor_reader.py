"""Tensors of safetensors files, one by one, in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

KEPT_OPEN = 32 << 20
"""Bytes that are read from a file before it is opened anew."""


class TensorReader:
    """Reads the tensors of a safetensors file.

    The pages of a mapped file stay in memory until it is closed, so it cannot stay open; and each opening reads the names of
    all tensors, which for a whole model takes a millisecond. It is therefore opened anew after every :data:`KEPT_OPEN` bytes.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Any = None
        self._read = 0

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, which may share memory with the file.

        Raises:
            OSError: If the file is missing or damaged, or has no tensor of this name.
        """
        try:
            if self._opened is None or self._read >= KEPT_OPEN:
                self._opened, self._read = safe_open(self.path, framework="pt"), 0
            tensor: Tensor = self._opened.get_tensor(name)
        except SafetensorError as error:
            raise OSError(f"{self.path} is damaged: {error}") from error
        self._read += tensor.nbytes
        return tensor
