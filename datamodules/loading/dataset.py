"""Dataset that reads and decodes samples of shards batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lit_lora.datamodules.decoding.batch_builder import BatchBuilder
from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.loading.bad_samples import BadSampleReport
from lit_lora.datamodules.loading.shard_reader import ShardReader
from lit_lora.redact import redact

Batch = dict[str, Any]

NO_MEMBER = "the decoder found no member that it needs (StopIteration)"
"""Reason why a sample is bad if its decoder's ``next()`` found nothing."""


class SlotRequest(NamedTuple):
    """Request for one sample of a batch.

    Attributes:
        sample: Number of the sample in the table.
        weight: Weight of the sample in the batch.
        slot: Number of this occurrence of the sample in the whole run.
        size: Planned height and width, in pixels.
    """

    sample: int
    weight: float
    slot: int
    size: tuple[int, int]


class ShardDataset(Dataset[Batch]):
    """Random access to the samples of shards.

    Args:
        reader: Reader of their members.
        decoder: Conversion of members to entries of a batch; or one for each set of shards.
        set_of_shard: Number of the set of each shard, which selects its decoder. Defaults to None: there is one set.
    """

    def __init__(
        self,
        reader: ShardReader,
        decoder: SampleDecoder | Sequence[SampleDecoder],
        set_of_shard: NDArray[np.int64] | None = None,
    ) -> None:
        self.reader = reader
        self._decoders = [decoder] if isinstance(decoder, SampleDecoder) else list(decoder)
        self._set_of_shard = set_of_shard
        self.decoder = self._decoders[0]

    def __len__(self) -> int:
        return len(self.reader.table)

    def __getitems__(self, requests: Sequence[SlotRequest]) -> Batch:
        """One batch of B samples.

        A bad sample does not change the shapes: another sample of the batch replaces it with weight 0. It is reported under
        ``"bad"``, since an exception would reach the main process without its type.

        Returns:
            The decoder's entries (tensors stacked, other values in lists of B); ``weight`` float32 (B,), ``slot`` list[int],
            ``key`` list[str], ``bad`` list[BadSampleReport].
        """
        batch = self.begin(requests)
        for place in range(len(batch)):
            batch.do(place)
        return batch.finish()

    def begin(self, requests: Sequence[SlotRequest]) -> UnfinishedBatch:
        """The same batch, whose samples are still to be loaded, by several threads if need be."""
        return UnfinishedBatch(self, requests)

    def load(self, request: SlotRequest) -> dict[str, Any]:
        """The entries of one sample.

        Raises:
            BadSampleError: If it cannot be used.
        """
        decoder = self._decoder_of(request.sample)
        members = self.reader.read(request.sample, decoder.extensions)
        image_size = self.reader.table.image_size(request.sample)
        try:
            entries = decoder(members, request.slot, request.size, image_size)
        except (
            StopIteration
        ) as error:  # of a `next()` that found no member; it would end the iteration over the batches
            raise BadSampleError(NO_MEMBER) from error
        return entries | {"key": self.reader.table.key(request.sample)}

    def _decoder_of(self, sample: int) -> SampleDecoder:
        if self._set_of_shard is None:
            return self.decoder
        return self._decoders[self._set_of_shard[self.reader.table.shard_of(sample)]]


class UnfinishedBatch:
    """A batch of B samples that threads may load at the same time; the result does not depend on who comes first.

    Args:
        dataset: Dataset of the samples.
        requests: The samples, at least one.
    """

    def __init__(self, dataset: ShardDataset, requests: Sequence[SlotRequest]) -> None:
        self._dataset = dataset
        self._requests = requests
        self._builder = BatchBuilder(len(requests))
        self._bad: dict[int, BadSampleReport] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def do(self, part: int) -> None:
        """Load the sample in one place."""
        request = self._requests[part]
        try:
            self._builder.put(part, self._dataset.load(request))
        except BadSampleError as error:
            table = self._dataset.reader.table
            shard = redact(table.locations[table.shard_of(request.sample)])
            self._bad[part] = BadSampleReport(shard, table.key(request.sample), str(error))

    def finish(self) -> Batch:
        """The batch, see :meth:`ShardDataset.__getitems__`."""
        requests, builder, decoder = self._requests, self._builder, self._dataset.decoder
        weights = [0.0 if place in self._bad else request.weight for place, request in enumerate(requests)]
        if not builder.places:
            builder.put(0, decoder.blank(requests[0].size) | {"key": ""})
        return {
            **builder.finish(),
            **decoder.batch_entries(),
            "weight": torch.tensor(weights),
            "slot": [request.slot for request in requests],
            "bad": [self._bad[place] for place in sorted(self._bad)],
        }
