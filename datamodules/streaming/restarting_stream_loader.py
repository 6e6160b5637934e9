"""The loader over a stream of shards for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from lit_lora.datamodules.loading.dataset import Batch
from lit_lora.datamodules.streaming.stream_loader import StreamLoader


class RestartingStreamLoader(StreamLoader):
    """Yields the first batches each time, at most ``num_batches``.

    Where there are several processes, one whose shards give out sooner goes on with batches in which nothing counts, so
    that all have the same number.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Yield the first batches.

        Raises:
            UserError: If more than ``max_bad_samples`` samples are bad.
        """
        self.close()
        self.batches, self.slots = 0, 0
        try:
            for batch in islice(self._fetch(), len(self)):
                self._count(batch)
                yield batch
            unused = len(self) * max(1, self._num_workers)  # workers number their batches each for itself
            while self.batches < len(self) and self._stream.world_size > 1:
                batch = self._stream.blank(unused + self.batches)
                self._count(batch)
                yield batch
        finally:
            self.close()
