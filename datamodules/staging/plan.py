"""The plan of staging: the shards to keep on local disk at each visit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.batches.plan import chunk_order


class StagingPlan:
    """The shards to keep at each visit, as a pure function of the arguments.

    Visit ``v = pass * K + position`` reads one of the K chunks.

    Args:
        sizes: Size of each shard in bytes.
        chunks: Shard numbers of each chunk.
        budget: Maximum total size of the kept shards in bytes.
        seed: Seed of the order of the chunks in each pass.
        shuffle: Whether each pass has its own order; otherwise chunks keep their order.
    """

    def __init__(
        self, sizes: Sequence[int], chunks: Sequence[Sequence[int]], budget: int, seed: int, shuffle: bool
    ) -> None:
        self.sizes = sizes
        self.chunks = chunks
        self.budget = budget
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, NDArray[np.int64]] = {}

    def chunk(self, visit: int) -> int:
        """Number of the chunk of a visit."""
        pass_number, position = divmod(visit, len(self.chunks))
        if pass_number not in self._orders:
            previous = {number: order for number, order in self._orders.items() if number == pass_number - 1}
            order = chunk_order(self.seed, pass_number, len(self.chunks), self.shuffle)
            self._orders = {**previous, pass_number: order}
        return int(self._orders[pass_number][position])

    def visits(self, first: int) -> range:
        """The visits from ``first`` whose shards fit the budget together, at most K after it."""
        kept: set[int] = set()
        size = 0
        for visit in range(first, first + len(self.chunks) + 1):
            new = set(self.chunks[self.chunk(visit)]) - kept
            size += sum(self.sizes[shard] for shard in new)
            if size > self.budget:
                return range(first, visit)
            kept |= new
        return range(first, visit + 1)

    def shards(self, visits: range) -> list[int]:
        """The shards of the given visits, each once, in the order in which they are needed."""
        return list(dict.fromkeys(shard for visit in visits for shard in self.chunks[self.chunk(visit)]))

    def next_use(self, first: int) -> list[float]:
        """The next visit from ``first`` that needs each shard; infinity if there is none."""
        uses = [math.inf] * len(self.sizes)
        for visit in range(first, first + 2 * len(self.chunks)):  # contains a full pass
            for shard in self.chunks[self.chunk(visit)]:
                uses[shard] = min(uses[shard], visit)
        return uses
