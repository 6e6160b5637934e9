"""Sets of shards, opened for a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lit_lora.datamodules.batches.buckets import AspectRatioBuckets, Bucketing
from lit_lora.datamodules.batches.chunked_samples import ChunkedSamples
from lit_lora.datamodules.batches.repeats import Repeats
from lit_lora.datamodules.caching.of_run import cache_of_run, decoder_of_run
from lit_lora.datamodules.caching.open_cache import OpenCache
from lit_lora.datamodules.decoding.captions import warn_of_changed_names
from lit_lora.datamodules.decoding.marked_decoder import MarkedDecoder
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.datamodules.indexing.same_shards import check_named_once
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.loading.dataset import ShardDataset
from lit_lora.datamodules.loading.shard_reader import ShardReader
from lit_lora.datamodules.shard_set import MOST_REPEATS, ShardSet, check_shares
from lit_lora.errors import UserError


@dataclass(frozen=True, eq=False)
class OpenSets:
    """The samples of all sets in one table, each set with its decoder and its cache.

    Attributes:
        table: Table of the samples.
        sets: The sets.
        repeats: Number of times that a round shows the samples of each set.
        caches: Cache of each set; None for one of images.
        decoders: Decoder of each set, before it is adapted to its cache and the run's seed.
        seed: Seed of the run.
        marked: Whether samples tell if they are class images.
    """

    table: SampleTable
    sets: Sequence[ShardSet]
    repeats: Repeats
    caches: Sequence[OpenCache | None]
    decoders: Sequence[SampleDecoder]
    seed: int
    marked: bool

    @classmethod
    def open(
        cls,
        sets: Sequence[ShardSet],
        decoders: Sequence[SampleDecoder],
        identity: Mapping[str, str],
        resolution: int,
        buckets: AspectRatioBuckets | None,
        seed: int,
        marked: bool,
    ) -> OpenSets:
        """Open sets, after checking that the run can use them, and all of them in one batch.

        Args:
            sets: The sets.
            decoders: Decoder of each set.
            identity: Result of the module's ``cache_identity()``; empty without a module.
            resolution: Resolution of the run, in pixels.
            buckets: Aspect ratio buckets of the run; None for squares.
            seed: Seed of the run.
            marked: Whether samples tell if they are class images.

        Raises:
            UserError: If shards are missing, damaged or named twice, samples are incomplete, a cache holds something else than
                the run needs, or samples of two sets cannot be in one batch.
        """
        check_shares(sets)
        warn_of_changed_names(decoders)
        tables = [open_table(one.shards) for one in sets]
        table = SampleTable.join(tables)
        check_named_once(table.locations)
        caches = [
            cache_of_run(of_set, decoder, identity, resolution, buckets)
            for of_set, decoder in zip(tables, decoders, strict=True)
        ]
        set_of_shard = np.repeat(np.arange(len(tables)), [len(of_set.locations) for of_set in tables])
        times = np.array([one.repeats for one in sets], np.float64)
        shares = np.array([np.nan if one.share is None else one.share for one in sets], np.float64)
        repeats = Repeats(times, set_of_shard, None if np.isnan(shares).all() else shares)
        opened = cls(table, sets, repeats, caches, decoders, seed, marked)
        final = opened._final(decoders)
        for of_set, decoder in zip(tables, final, strict=True):
            for what, extensions in decoder.required.items():
                of_set.check_complete(what, extensions)
        height, width = Bucketing.of(resolution, buckets).sizes[0].tolist()
        _check_together(sets, final, (height, width))
        return opened

    @property
    def cached(self) -> frozenset[str]:
        """Parts of a batch that come from caches."""
        return frozenset.intersection(*(cache.description.cached if cache else frozenset() for cache in self.caches))

    def dataset(self, locate: Callable[[int], Path] | None = None, evaluation: bool = False) -> ShardDataset:
        """Random access to the samples.

        Args:
            locate: Function from the number of a shard to its local file. Defaults to None: shards are read in place.
            evaluation: Whether to decode without random crops and flips. Defaults to False.
        """
        decoders = [decoder.for_evaluation() for decoder in self.decoders] if evaluation else self.decoders
        return ShardDataset(ShardReader(self.table, locate), self._final(decoders), self.repeats.set_of_shard)

    def check_shown(self, samples: ChunkedSamples) -> None:
        """Check that each set has samples in a pass.

        Args:
            samples: What is left of the sets to train on.

        Raises:
            UserError: If a set has no samples, or too few for its repeats or share.
        """
        left = samples.available.sum(axis=(1, 2))
        shown = left * samples.repeats.whole + samples.parts.sum(axis=(1, 2))
        for one, count, times in zip(self.sets, left.tolist(), shown.tolist(), strict=True):
            name, value = ("repeats", one.repeats) if one.share is None else ("share", one.share)
            if not times:
                raise UserError(
                    f"{name}={value:g} of {one.name} shows none of its {count} samples in a pass; raise {name}, add"
                    " samples, or remove the set"
                )
            if times > MOST_REPEATS * count:
                raise UserError(
                    f"{name}={value:g} of {one.name} shows its {count} samples more than {MOST_REPEATS:,} times in a pass; lower "
                    f"{name}, or add samples"
                )

    def without_prior(self) -> tuple[NDArray[np.int64], int]:
        """Numbers of the shards that hold no class images, ascending, and the number of their samples."""
        subjects = [number for number, one in enumerate(self.sets) if not one.prior]
        shards = np.flatnonzero(np.isin(self.repeats.set_of_shard, subjects))
        return shards, int(np.diff(self.table.starts)[shards].sum())

    def _final(self, decoders: Sequence[SampleDecoder]) -> list[SampleDecoder]:
        """The decoders of the run."""
        final = [
            decoder_of_run(decoder, cache, self.seed) for decoder, cache in zip(decoders, self.caches, strict=True)
        ]
        if not self.marked:
            return final
        return [MarkedDecoder(decoder, one.prior) for decoder, one in zip(final, self.sets, strict=True)]


def _check_together(sets: Sequence[ShardSet], decoders: Sequence[SampleDecoder], size: tuple[int, int]) -> None:
    first, *others = (_kinds(decoder.blank(size)) for decoder in decoders)
    for one, kinds in zip(sets[1:], others, strict=True):
        name = next((name for name in {**first, **kinds} if first.get(name) != kinds.get(name)), None)
        if name is not None:
            raise UserError(
                f"samples of {sets[0].name} and {one.name} cannot be in one batch: {name} is {first.get(name, 'missing')} in the "
                f"first and {kinds.get(name, 'missing')} in the second; give both sets the same kind of decoder, masks for both"
                " or for none, and caches of the same kind"
            )


def _kinds(entries: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """What each entry of a sample is: dtype and shape of tensors, the type of other values."""
    kinds: dict[str, str] = {}
    for name, value in entries.items():
        if isinstance(value, Mapping):
            kinds |= _kinds(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            kinds[prefix + name] = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        else:
            kinds[prefix + name] = type(value).__name__
    return kinds
