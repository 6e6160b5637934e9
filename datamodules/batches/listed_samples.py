"""Samples of a table, selected one by one."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.batches.buckets import Bucketing
from lit_lora.datamodules.indexing.table import SampleTable


class ListedSamples:
    """Evaluation samples of a :class:`~lit_lora.datamodules.batches.plan.Plan`, in one chunk.

    Args:
        table: Table of all samples.
        samples: Numbers of the selected samples, ascending, int64 (n,).
        bucketing: Assignment of a size to each sample.
    """

    copies = 1

    def __init__(self, table: SampleTable, samples: NDArray[np.int64], bucketing: Bucketing) -> None:
        self.table = table
        self.sizes = bucketing.sizes
        self._samples = samples
        self._buckets: NDArray[np.integer] = np.zeros(len(samples), bucketing.dtype)
        if bucketing.needs_sizes:
            self._buckets = bucketing.assign(*table.sizes_of(samples))
        self.counts = np.bincount(self._buckets, minlength=len(self.sizes))[None]

    @property
    def total(self) -> int:
        """Number of samples in the table."""
        return len(self.table)

    def __str__(self) -> str:
        """Number of the samples, and a checksum of their keys, which does not depend on where the shards are."""
        return f"{len(self._samples)} ({zlib.crc32(self._samples.tobytes(), self.table.key_digest):08x})"

    def samples(self, chunk: int, turn: int = 0) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """Sample numbers, int64 (n,), and buckets (n,)."""
        return self._samples, self._buckets
