"""The interface of the samples of a plan."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class PlannedSamples(Protocol):
    """The samples that are planned, in K chunks and B buckets.

    Attributes:
        total: Number of samples in the data set, including those that are not planned; sample numbers are smaller than this.
        copies: Most times that a round shows a sample.
        counts: Number of samples that a round shows in each chunk and bucket, repeats included, int64 (K, B).
        sizes: Height and width in pixels of each bucket, int64 (B, 2).
    """

    @property
    def total(self) -> int: ...

    @property
    def copies(self) -> int: ...

    @property
    def counts(self) -> NDArray[np.int64]: ...

    @property
    def sizes(self) -> NDArray[np.int64]: ...

    def samples(self, chunk: int, turn: int) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """The samples that a round shows, each as ``copy * total + sample``, int64 (n,), and their buckets (n,).

        Args:
            chunk: Number of the chunk.
            turn: Number that grows by one from pass to pass and from round to round of a visit; which samples are repeated may
                depend on it, but not how many.
        """
