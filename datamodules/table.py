"""The samples of many shards as one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.columns import SampleColumns
from lit_lora.datamodules.index import ShardIndex
from lit_lora.datamodules.scan import EXTENSIONS


@dataclass(frozen=True, eq=False)
class SampleTable(SampleColumns):
    """The samples (N) of all shards, numbered in the order of the shards, and their members (M).

    10 million samples take about 1 GB.

    Attributes:
        paths: The shards.
        shard: The shard of each sample, a number in ``paths``, int32 (N,).
    """

    paths: tuple[Path, ...]
    shard: NDArray[np.int32]

    @classmethod
    def concatenate(cls, indexes: Sequence[ShardIndex]) -> SampleTable:
        """One table of at least one index."""
        counts = np.array([len(index) for index in indexes])
        first_sample = np.cumsum(counts) - counts
        key_lengths = np.array([len(index.key_bytes) for index in indexes])
        first_byte = np.cumsum(key_lengths) - key_lengths
        return cls(
            paths=tuple(index.path for index in indexes),
            shard=np.repeat(np.arange(len(indexes), dtype=np.int32), counts),
            key_bytes=np.concatenate([index.key_bytes for index in indexes]),
            key_ends=np.concatenate([i.key_ends + first for i, first in zip(indexes, first_byte, strict=True)]),
            width=np.concatenate([index.width for index in indexes]),
            height=np.concatenate([index.height for index in indexes]),
            member_sample=np.concatenate(
                [i.member_sample + first for i, first in zip(indexes, first_sample, strict=True)]
            ),
            member_extension=np.concatenate([index.member_extension for index in indexes]),
            member_offset=np.concatenate([index.member_offset for index in indexes]),
            member_size=np.concatenate([index.member_size for index in indexes]),
        )

    def path(self, sample: int) -> Path:
        """The shard of a sample."""
        return self.paths[self.shard[sample]]

    def find_members(self, extensions: Sequence[str]) -> NDArray[np.int64]:
        """For each sample the number of its member with the first of these extensions that it has, else -1.

        Returns:
            int64 (N,).
        """
        found = np.full(len(self), -1, np.int64)
        for extension in reversed(extensions):
            members = np.flatnonzero(self.member_extension == EXTENSIONS.index(extension))
            found[self.member_sample[members]] = members
        return found
