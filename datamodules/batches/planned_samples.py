"""The interface of the samples of a plan."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class PlannedSamples(Protocol):
    """The samples that are planned, in K chunks and B buckets.

    Attributes:
        total: Number of samples in the data set, including those that are not planned; sample numbers are smaller than this.
        counts: Number of planned samples in each chunk and bucket, int64 (K, B).
        sizes: Height and width in pixels of each bucket, int64 (B, 2).
    """

    @property
    def total(self) -> int: ...

    @property
    def counts(self) -> NDArray[np.int64]: ...

    @property
    def sizes(self) -> NDArray[np.int64]: ...

    def samples(self, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample numbers and buckets of a chunk, int64 (n,) both."""
