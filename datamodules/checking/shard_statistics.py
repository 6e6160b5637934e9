"""Statistics of shards: counts, sizes and aspect ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_lora.byte_sizes import format_bytes
from lit_lora.datamodules.batches.buckets import Bucketing
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.scan import EXTENSIONS

_PERCENTILES = {"min": 0, "1%": 1, "10%": 10, "median": 50, "90%": 90, "99%": 99, "max": 100}
_ASPECT_RATIOS = ((1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (4, 5), (1, 1))
_BAR = 30

Rows = list[list[str]]


@dataclass(frozen=True, eq=False)
class ShardStatistics:
    """Statistics of the samples (N) of shards, as tables.

    Attributes:
        shards: Number of shards.
        size: Total size of the shards in bytes.
        members: Number of members and their total size in bytes, by extension.
        width: Widths of the images after the rotation by EXIF, in pixels, int64 (N,); 0 if there is no readable image.
        height: Heights of the images, in the same way.
    """

    shards: int
    size: int
    members: dict[str, tuple[int, int]]
    width: NDArray[np.int64]
    height: NDArray[np.int64]

    @classmethod
    def of(cls, indexes: Sequence[ShardIndex]) -> ShardStatistics:
        """The statistics of one or more shards."""
        counts = np.zeros(len(EXTENSIONS), np.int64)
        sizes = np.zeros(len(EXTENSIONS), np.int64)
        for index in indexes:
            counts += np.bincount(index.member_extension, minlength=len(EXTENSIONS))
            np.add.at(sizes, index.member_extension, index.member_size)
        return cls(
            shards=len(indexes),
            size=sum(index.shard_size for index in indexes),
            members={e: (int(n), int(b)) for e, n, b in zip(EXTENSIONS, counts, sizes, strict=True) if n},
            width=np.concatenate([index.width for index in indexes]).astype(np.int64),
            height=np.concatenate([index.height for index in indexes]).astype(np.int64),
        )

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Whether the size of each image is known, bool (N,)."""
        return (self.width > 0) & (self.height > 0)

    def total_rows(self) -> Rows:
        """Table of the numbers of shards and samples, and of their size."""
        rows = [["shards", f"{self.shards:,}"], ["samples", f"{len(self.width):,}"], ["size", format_bytes(self.size)]]
        unknown = len(self.width) - int(self.is_known.sum())
        return [*rows, ["images of unknown size", f"{unknown:,}"]] if unknown else rows

    def member_rows(self) -> Rows:
        """Table of the members by extension."""
        rows = [["members", "number", "size", "mean"]]
        for extension, (count, size) in self.members.items():
            rows.append([f".{extension}", f"{count:,}", format_bytes(size), format_bytes(size / count)])
        return rows

    def size_rows(self) -> Rows:
        """Table of the images' sizes in percentiles."""
        width, height = self.width[self.is_known], self.height[self.is_known]
        measures = {
            "width": (width, "{:.0f}"),
            "height": (height, "{:.0f}"),
            "short side": (np.minimum(width, height), "{:.0f}"),
            "megapixels": (width * height / 1e6, "{:.2f}"),
        }
        rows = [["pixels", *_PERCENTILES]]
        for name, (values, form) in measures.items():
            found = np.percentile(values, list(_PERCENTILES.values()), method="nearest")
            rows.append([name, *(form.format(value) for value in found)])
        return rows

    def aspect_rows(self) -> Rows:
        """Table of the images by the nearest usual aspect ratio, on a logarithmic scale."""
        named = {f"{a}:{b}": a / b for a, b in _ASPECT_RATIOS}
        named |= {f"{b}:{a}": b / a for a, b in reversed(_ASPECT_RATIOS)}
        ratios = np.log(list(named.values()))
        shapes = np.log(self.width[self.is_known] / self.height[self.is_known])
        counts = np.bincount(np.searchsorted((ratios[1:] + ratios[:-1]) / 2, shapes), minlength=len(named))
        rows = [["width:height", "images", "share", ""]]
        for name, count in zip(named, counts.tolist(), strict=True):
            bar = "#" * round(_BAR * count / max(1, int(counts.max())))
            rows.append([name, f"{count:,}", f"{count / max(1, int(counts.sum())):.1%}", bar.ljust(_BAR)])
        return rows

    def bucket_rows(self, bucketing: Bucketing) -> Rows:
        """Table of the buckets that training would use, with the share of pixels cropped and of images enlarged."""
        width, height = self.width[self.is_known], self.height[self.is_known]
        bucket = bucketing.assign(width, height)
        rows = [["bucket (h x w)", "images", "share", "mean crop loss", "upscaled"]]
        for number, (bucket_height, bucket_width) in enumerate(bucketing.sizes.tolist()):
            here = bucket == number
            if not here.any():
                continue
            scale = np.maximum(bucket_height / height[here], bucket_width / width[here])
            kept = bucket_height * bucket_width / (width[here] * height[here] * scale**2)
            rows.append(
                [
                    f"{bucket_height} x {bucket_width}",
                    f"{here.sum():,}",
                    f"{here.mean():.1%}",
                    f"{1 - kept.mean():.1%}",
                    f"{(scale > 1).mean():.1%}",
                ]
            )
        return rows
