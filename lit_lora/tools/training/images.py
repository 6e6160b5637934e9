"""What packed images are like, as far as the choices of a run depend on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.batches.buckets import AspectRatioBuckets, Bucketing
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.datamodules.loading.shard_reader import ShardReader

_READ_CAPTIONS = 1000


@dataclass(frozen=True, eq=False)
class Images:
    """Sizes and captions of the images to train on.

    Args:
        widths: Widths in pixels, (N,).
        heights: Heights in pixels, (N,).
        captions: Captions of the first 1000 images.
        repeats: Samples of a pass for each image: more than 1 where sets are repeated, or class images are added. Defaults to 1.
    """

    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    captions: tuple[str, ...]
    repeats: float = 1.0

    @classmethod
    def of(cls, *shards: str | Path, samples: float | None = None) -> Images:
        """The images of packed shards.

        Args:
            shards: Shards or their folders.
            samples: Number of samples that a pass shows; defaults to that of the images.

        Raises:
            UserError: If a shard is missing or damaged.
        """
        table = open_table([str(one) for one in shards])
        widths, heights = table.image_sizes(np.arange(len(table.locations)))
        sources = Captions()
        reader = ShardReader(table)
        read = (reader.read(sample, sources.extensions) for sample in range(min(len(table), _READ_CAPTIONS)))
        captions = tuple(sources.draw(members, seed=0, slot=0) for members in read)
        repeats = 1.0 if samples is None else samples / len(widths)
        return cls(widths.astype(np.int64), heights.astype(np.int64), captions, repeats)

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def edge(self) -> int:
        """Edge of a square with the area of the median image, in pixels."""
        return int(np.sqrt(np.median(self.widths * self.heights)))

    def in_buckets(self, resolution: int, buckets: AspectRatioBuckets) -> list[int]:
        """Number of images in each bucket that has any."""
        found = Bucketing.of(resolution, buckets).assign(self.widths, self.heights)
        return list(Counter(found.tolist()).values())
