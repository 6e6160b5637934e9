"""Encoding of a shard of images to a shard of latents and text embeddings."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from lit_lora.datamodules.batches.buckets import Bucketing
from lit_lora.datamodules.caching.cached_decoder import (
    FLIPPED,
    LATENTS,
    MASK,
    SIZES,
    SOURCE,
    encode_cached,
    without_padding,
)
from lit_lora.datamodules.caching.empty_caption import keep_empty
from lit_lora.datamodules.caching.input_decoder import SOURCE_PIXELS, InputDecoder
from lit_lora.datamodules.caching.latent_cache import EMPTY, CacheDescription
from lit_lora.datamodules.caching.sources import SourceRecord, is_newer, record_path
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.decoding.mask import MaskSource
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.scan import CACHED_EXTENSION
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.loading.bad_samples import BadSampleReport
from lit_lora.datamodules.loading.dataset import Batch, ShardDataset, SlotRequest
from lit_lora.datamodules.loading.shard_reader import ShardReader
from lit_lora.datamodules.loading.threads import LoaderThreads
from lit_lora.datamodules.packing.write_shard import write_shard
from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.errors import UserError
from lit_lora.loss_mask import mask_of_latents
from lit_lora.redact import redact
from lit_lora.visible import visible

_BATCHES_AT_A_TIME = 64
"""Number of batches' worth of consecutive samples that are grouped by size. Shards are written in order, so this many batches
are in memory at a time."""


class CachedShard(NamedTuple):
    """The result of caching a shard.

    Attributes:
        path: Path of the shard in the cache.
        samples: Number of its samples; if it is 0, the shard was not written.
        bad: Samples that were left out.
        resumed: Whether the shard already existed.
    """

    path: Path
    samples: int
    bad: list[BadSampleReport]
    resumed: bool


class CacheWriter:
    """Writes shards of a cache.

    Args:
        family: A :class:`~lit_lora.families.ModelFamily` with its VAE and, if text is cached, its text encoders.
        table: Table of the samples to cache.
        description: Description of the cache.
        bucketing: Assignment of a size to each image.
        captions: Sources of captions; they must be fixed if text is cached.
        batch_size: Number of images that are encoded at a time.
        num_workers: Threads that read and decode ahead; 0 reads between the batches.
        bring: Function that brings one of the encoders to the device, by its name in the pipeline or ``text`` for all text
            encoders; batches are then encoded 64 at a time by each encoder. Defaults to None: all are there.
    """

    def __init__(
        self,
        family: Any,
        table: SampleTable,
        description: CacheDescription,
        bucketing: Bucketing,
        captions: Captions,
        batch_size: int,
        num_workers: int,
        bring: Callable[[str], None] | None = None,
    ) -> None:
        self.family = family
        self._bring = bring or (lambda name: None)
        self._at_a_time = 1 if bring is None else _BATCHES_AT_A_TIME
        self.table = table
        self.description = description
        self.bucketing = bucketing
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._text = "text" in description.cached
        self._sides = ("", FLIPPED) if description.flipped else ("",)
        mask = cast("MaskSource | None", description.mask)
        self._checked: set[Path] = set()
        self._decoder = InputDecoder(captions, self._text, self._sides, mask, description.pairs, description.background)

    def write(self, shard: int, path: Path, progress: Callable[[int], None]) -> CachedShard:
        """Write the cached shard and its index; an existing one is kept.

        If text is cached, this also writes ``empty.safetensors`` beside the first shard.

        Args:
            shard: Number of the shard in the table.
            path: Path of the cached shard.
            progress: Function that is called with the number of samples that were finished since the last call.

        Raises:
            UserError: If ``path`` exists and was made from another shard or other samples, the shard changes meanwhile, or
                earlier shards have text embeddings of another dtype.
        """
        first, end = self.table.starts[shard : shard + 2].tolist()
        begun = path.exists() and (path.parent / EMPTY).exists()
        if self._text and not begun and path.parent not in self._checked:
            [encoded] = self._texts([[""]])
            keep_empty(path.parent, {name: value[0].contiguous() for name, value in encoded.items()})
            self._checked.add(path.parent)
        if path.exists():
            return self._resume(range(first, end), path, progress)
        record = SourceRecord.of(self.table, shard, path, self.description.checksum())
        record.write(path)  # before the shard, so that no shard is without one
        bad: list[BadSampleReport] = []
        index = write_shard(path, self._unchanged(record, shard, range(first, end), bad, progress), tarfile.PAX_FORMAT)
        if index is None:
            record_path(path).unlink()
        return CachedShard(path, 0 if index is None else len(index), bad, resumed=False)

    def _resume(self, samples: range, path: Path, progress: Callable[[int], None]) -> CachedShard:
        """The result for an existing shard; samples that it lacks are encoded again to find out why they were left out."""
        index = ShardIndex.load_or_build(path)
        cached = {index.key(number) for number in range(len(index))}
        numbers = {self.table.key(number): number for number in samples}
        missing = sorted(number for key, number in numbers.items() if key not in cached)
        bad: list[BadSampleReport] = []
        good = sum(1 for _ in self._encode(missing, bad, progress))
        others = len(cached - numbers.keys())
        if good or others:
            raise UserError(
                f"{visible(path)} was made from other samples than {self._location(samples[0])} has now: {good} are missing and"
                f" {others} are not in that shard; remove it, or choose another folder with --out"
            )
        self._check_source(self.table.shard_of(samples[0]), path)
        progress(len(cached))
        return CachedShard(path, len(cached), bad, resumed=True)

    def _check_source(self, shard: int, path: Path) -> None:
        """Refuse an existing cached shard whose source has other content now; other times of the same are kept."""
        location, record = self.table.locations[shard], SourceRecord.read(path)
        if is_newer(location, path) if record is None else not record.is_of(self.table, shard):
            raise UserError(
                f"{redact(location)} was changed after {visible(path)} was made from it, so that its samples may differ; remove"
                f" {visible(path)} to encode it anew"
                + (", or touch it if the samples are the same" if record is None else "")
            )
        if record is not None and not is_remote(location) and not record.has_times_of(Path(location)):
            SourceRecord.of(self.table, shard, path, record.cache).write(path)

    def _unchanged(
        self,
        record: SourceRecord,
        shard: int,
        samples: range,
        bad: list[BadSampleReport],
        progress: Callable[[int], None],
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the samples of a shard; raises an error at the end if the shard was changed meanwhile."""
        yield from self._encode(samples, bad, progress)
        location = self.table.locations[shard]
        if not is_remote(location) and not record.has_times_of(Path(location)):
            raise UserError(f"{redact(location)} was changed while it was cached; run lit-lora cache again")

    def _encode(
        self, samples: Sequence[int], bad: list[BadSampleReport], progress: Callable[[int], None]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield key and members of each good sample, in order; bad samples are appended to ``bad``."""
        done: dict[int, dict[str, bytes] | None] = {}
        written = 0
        for batch, tensors, text in self._encoded(samples, progress):
            bad += batch["bad"]
            done |= self._batch_members(batch, tensors, text, bad)
            progress(len(batch["slot"]))
            while written < len(samples) and samples[written] in done:
                members = done.pop(samples[written])
                if members is not None:
                    yield self.table.key(samples[written]), members
                written += 1

    def _encoded(
        self, samples: Sequence[int], progress: Callable[[int], None]
    ) -> Iterator[tuple[Batch, dict[str, Tensor], dict[str, Tensor]]]:
        """Yield each batch with its latents and text embeddings; several batches go through each encoder in turn."""
        batches = self._load(samples)
        while True:
            group: list[tuple[Batch, dict[str, Tensor]]] = []
            for batch in islice(batches, self._at_a_time):
                if not group:
                    self._bring("vae")
                group.append((batch, self._latents(batch)))
                progress(0)  # for a process that has to stop
            if not group:
                return
            texts = self._texts([batch["caption"] for batch, _ in group]) if self._text else repeat({})
            for (batch, tensors), text in zip(group, texts, strict=self._text):
                yield batch, tensors, text

    @torch.no_grad()
    def _texts(self, captions: Sequence[list[str]]) -> Iterator[dict[str, Tensor]]:
        """Yield the embeddings of each batch of captions, on the CPU; all batches go through each text encoder in turn."""
        running = [self.family.encoding_steps(one) for one in captions]
        names = {next(steps) for steps in running}
        while names:
            self._bring(names.pop())
            assert not names, "all batches use the text encoders in the same order"
            for steps in running:
                try:
                    names.add(next(steps))
                except StopIteration as end:
                    yield {name: value.cpu() for name, value in end.value.items()}

    def _load(self, samples: Sequence[int]) -> Iterator[Batch]:
        """Yield batches of images, each of one size."""
        dataset = ShardDataset(ShardReader(self.table), self._decoder)
        if not self.num_workers:
            yield from map(dataset.__getitems__, self._requests(samples))
            return
        threads = LoaderThreads(dataset.begin, self.num_workers)
        try:
            yield from threads.run(self._requests(samples))
        finally:
            threads.close()

    def _requests(self, samples: Sequence[int]) -> Iterator[list[SlotRequest]]:
        window = _BATCHES_AT_A_TIME * self.batch_size
        for start in range(0, len(samples), window):
            by_size: dict[tuple[int, int], list[SlotRequest]] = {}
            for sample in samples[start : start + window]:
                size = self._size(sample)
                by_size.setdefault(size, []).append(SlotRequest(sample, 1.0, sample, size))
            for requests in by_size.values():
                for first in range(0, len(requests), self.batch_size):
                    yield requests[first : first + self.batch_size]

    def _size(self, sample: int) -> tuple[int, int]:
        """Height and width at which a sample is trained."""
        width, height = (np.array([edge]) for edge in self.table.image_size(sample))
        bucket = self.bucketing.assign(width, height)[0]
        return int(self.bucketing.sizes[bucket, 0]), int(self.bucketing.sizes[bucket, 1])

    @torch.no_grad()
    def _latents(self, batch: Batch) -> dict[str, Tensor]:
        """Latents and masks of a batch, whose images are then dropped."""
        tensors = {name: batch[name] for name in SIZES} | self._posteriors(batch)
        if self.description.mask:
            size = tensors[LATENTS[0]].shape[-2:]
            tensors |= {MASK + side: mask_of_latents(batch[MASK + side], size) for side in self._sides}
        for side in self._sides:
            del batch[f"pixel_values{side}"]
            batch.pop(SOURCE_PIXELS + side, None)
        return tensors

    def _batch_members(
        self, batch: Batch, tensors: Mapping[str, Tensor], text: Mapping[str, Tensor], bad: list[BadSampleReport]
    ) -> dict[int, dict[str, bytes] | None]:
        """The members of each sample by its number; None for a bad sample."""
        encoded: dict[int, dict[str, bytes] | None] = {}
        for place, (sample, weight) in enumerate(zip(batch["slot"], batch["weight"].tolist(), strict=True)):
            encoded[sample] = None
            if weight:
                embeddings = without_padding(_row(text, place), self.description.text_masks)
                try:
                    encoded[sample] = self._members(batch, place, _row(tensors, place), embeddings)
                except BadSampleError as error:
                    bad.append(BadSampleReport(self._location(sample), self.table.key(sample), str(error)))
        return encoded

    def _posteriors(self, batch: Batch) -> dict[str, Tensor]:
        dtype = getattr(torch, self.description.dtype)
        posteriors = {}
        for side in self._sides:
            pixel_values = batch[f"pixel_values{side}"].to(self.family.device, non_blocking=True)
            for name, values in zip(LATENTS, self.family.posterior(pixel_values), strict=True):
                posteriors[name + side] = values.to(dtype).cpu()
            if self.description.pairs:
                sources = batch[SOURCE_PIXELS + side].to(self.family.device, non_blocking=True)
                posteriors[SOURCE + side] = self.family.posterior(sources)[0].to(dtype).cpu()
        return posteriors

    def _members(
        self, batch: Batch, place: int, tensors: Mapping[str, Tensor], text: Mapping[str, Tensor]
    ) -> dict[str, bytes]:
        height, width = batch["original_size"][place].tolist()
        return {CACHED_EXTENSION: encode_cached(tensors, text, width, height)} | dict(batch["caption_members"][place])

    def _location(self, sample: int) -> str:
        return redact(self.table.locations[self.table.shard_of(sample)])


def _row(tensors: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    return {name: values[place] for name, values in tensors.items()}
