"""The loader for evaluation on a stream, which restarts at each iteration."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from lit_lora.datamodules.loading.dataset import Batch
from lit_lora.datamodules.streaming.stream_loader import StreamLoader


class RestartingStreamLoader(StreamLoader):
    """A loader that yields the first batches of the stream at each iteration, at most ``num_batches``.

    With several processes, one whose shards end early continues with batches of weight 0, so that all processes yield the same
    number of batches.
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
            unused = len(self) * max(1, self._num_workers)  # each worker numbers its own batches
            while self.batches < len(self) and self._stream.world_size > 1:
                batch = self._stream.blank(unused + self.batches)
                self._count(batch)
                yield batch
        finally:
            self.close()
