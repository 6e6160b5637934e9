"""Samples of a plan without chunks and buckets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class OneChunk:
    """All samples, in one chunk and at one size."""

    total: int
    size: tuple[int, int] = (0, 0)

    @property
    def counts(self) -> NDArray[np.int64]:
        return np.array([[self.total]])

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.array([self.size])

    copies = 1

    def samples(self, chunk: int, turn: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.arange(self.total), np.zeros(self.total, np.int64)
