"""The loader over a stream of shards."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lit_lora.datamodules.batches.read_cursor import read_count
from lit_lora.datamodules.loading.bad_samples import BadSamples, list_reports
from lit_lora.datamodules.loading.dataset import Batch
from lit_lora.datamodules.streaming.shard_stream import ShardStream
from lit_lora.errors import UserError

_MAX_COUNT = 2**48


class StreamLoader:
    """One process's batches of an endless stream, divided into epochs.

    An iteration yields the remaining batches of the current epoch; ``len`` is the number of batches in a full epoch. The state
    counts batches and is the same in all processes.

    Args:
        stream: Stream of batches.
        num_batches: Batches in an epoch.
        num_workers: Worker processes that read and decode. Defaults to 0, which reads in this process.
        max_bad_samples: Maximum number of different bad samples and damaged shards, which are skipped. Defaults to 0.
    """

    def __init__(self, stream: ShardStream, num_batches: int, num_workers: int = 0, max_bad_samples: int = 0) -> None:
        self.num_batches = num_batches
        self.batches = 0
        self.slots = 0
        self._stream = stream
        self._num_workers = num_workers
        self._iterator: Any = None  # Lightning looks for worker processes under this name when it ends
        self._bad = BadSamples(max_bad_samples, "bad samples or shards", "skipped", "repair the shards")

    def __len__(self) -> int:
        return self.num_batches

    @property
    def num_bad_samples(self) -> int:
        """Number of different samples and damaged shards that this process has skipped so far."""
        return len(self._bad)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the remaining batches of the current epoch.

        Raises:
            UserError: If more than ``max_bad_samples`` samples are bad, or the shards contain no usable samples.
        """
        for batch in islice(self._fetch(), len(self) - self.batches % len(self)):
            self._count(batch)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Number of batches that this process has yielded, and of slots that all processes have used."""
        return {"batches": self.batches, "slots": self.slots}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the saved number of batches, with newly drawn shards.

        Raises:
            UserError: If the state was saved by another datamodule, or is damaged.
        """
        if not isinstance(state, dict) or state.keys() != self.state_dict().keys():
            raise UserError(
                "cannot resume within the data: the checkpoint was made with another datamodule; use that one, or load"
                " only the checkpoint's weights"
            )
        batches, slots = (read_count(state, name, _MAX_COUNT) for name in ("batches", "slots"))
        if state == self.state_dict():
            return
        self.close()
        self.batches, self.slots = batches, slots
        rank_zero_info(
            f"the data is a stream, so resuming is approximate: after {self.batches} batches it continues with newly drawn"
            " shards, which may repeat samples of the epoch"
        )

    def restart(self, state: dict[str, int] | None) -> None:
        """Continue after the saved number of batches, or for None from the start.

        Raises:
            UserError: If the state was saved by another datamodule.
        """
        if state is not None:
            self.load_state_dict(state)
            return
        self.close()
        self.batches, self.slots = 0, 0

    def close(self) -> None:
        """End the worker processes; the next iteration starts new ones.

        If the garbage collector ended them, this could take seconds.
        """
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            self._iterator._shutdown_workers()
        self._iterator = None

    def _fetch(self) -> Iterator[Batch]:
        """Yield the following batches of the stream; successive iterations share the workers."""
        if self._iterator is None:
            self._stream.start = (self.batches, self.slots)
            workers = DataLoader(
                self._stream,
                batch_size=None,
                num_workers=self._num_workers,
                collate_fn=_identity,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # otherwise it would draw from the global generator
            )
            self._iterator = iter(workers)
        for batch in self._iterator:
            self._bad.count(batch.pop("bad"))
            if batch:
                yield batch
            elif self._stream.resampled:
                raise UserError(
                    f"the shards contain no usable samples; check train_shards:{list_reports(self._bad.values())}"
                )

    def _count(self, batch: Batch) -> None:
        self.batches += 1
        self.slots += len(batch["slot"]) * self._stream.world_size


def _identity(batch: Any) -> Any:
    return batch
