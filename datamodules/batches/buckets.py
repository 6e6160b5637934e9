"""Aspect ratio buckets: sizes of training images, and the choice of a size for each image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.argument_types import check_types
from lit_lora.draws import seed_of
from lit_lora.errors import UserError, check_most, check_whole

LEFT_OUT = -1
"""Bucket number of an image that is too small for any bucket."""

MAX_RESOLUTION = 10_000
"""Maximum side of a square in pixels, whose area is that of the largest image that is decoded."""


def check_resolution(resolution: int) -> None:
    """Refuse a resolution that no image can have.

    Raises:
        UserError: If it is not between 1 and ``MAX_RESOLUTION``.
    """
    check_whole(1, resolution=resolution)
    check_most(MAX_RESOLUTION, resolution=resolution)


@dataclass(frozen=True)
class AspectRatioBuckets:
    """Sizes at which images are trained close to their own shape, with about the area of ``resolution`` squared.

    The sizes are those of NovelAI's and SDXL's training: multiples of ``divisor`` whose area is at most that of the
    square, for each width the tallest and for each height the widest (Podell et al. 2023, appendix I).

    Args:
        divisor: Number of pixels that divides widths and heights. Defaults to 64, for Stable Diffusion, whose VAE needs
            multiples of 8.
        max_aspect_ratio: Maximum ratio of the long side to the short side; 1 trains only squares. Defaults to 2.0.
        max_upscaling: Maximum factor by which a training image may be enlarged; images that need more are excluded. Defaults
            to null: no limit. Validation and test images are never excluded.

    Raises:
        UserError: If a value is out of its bounds.
    """

    divisor: int = 64
    max_aspect_ratio: float = 2.0
    max_upscaling: float | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_whole(1, **{"buckets.divisor": self.divisor})
        if not 1 <= self.max_aspect_ratio <= 16:
            raise UserError(f"buckets.max_aspect_ratio={self.max_aspect_ratio} must be in [1, 16]")
        if self.max_upscaling is not None and self.max_upscaling < 1:
            raise UserError(
                f"buckets.max_upscaling={self.max_upscaling} is too small; it must be at least 1, or null for no limit"
            )

    def sizes(self, resolution: int) -> NDArray[np.int64]:
        """The sizes for a resolution, from the tallest to the widest.

        Returns:
            int64 (B, 2), height and width in pixels.

        Raises:
            UserError: If the resolution is above ``MAX_RESOLUTION``, or not a multiple of the divisor.
        """
        check_resolution(resolution)
        if resolution % self.divisor:
            nearest = max(self.divisor, round(resolution / self.divisor) * self.divisor)
            raise UserError(
                f"resolution={resolution} is not a multiple of buckets.divisor={self.divisor};"
                f" choose {nearest} or another divisor"
            )
        sizes = set()
        for one in range(self.divisor, int(resolution * self.max_aspect_ratio) + 1, self.divisor):
            other = resolution**2 // one // self.divisor * self.divisor
            if 0 < max(one, other) <= min(one, other) * self.max_aspect_ratio:
                sizes |= {(one, other), (other, one)}
        return np.array(sorted(sizes, key=lambda size: (size[1] / size[0], size)), np.int64)

    def description(self) -> dict[str, Any]:
        """The options that determine the size of each image, as JSON values."""
        return {"divisor": self.divisor, "max_aspect_ratio": self.max_aspect_ratio}


_BLOCK = 1 << 16
"""Images whose buckets are found at a time, so that the arrays fit into the processor's cache."""

_CELL_BITS = 14
"""Bits of a float32 that its cell ignores: cells are 0.2 to 0.4 % wide."""

_UNSURE = -2


@dataclass(frozen=True)
class Bucketing:
    """Assigns each image the size at which it is trained.

    Attributes:
        sizes: Height and width in pixels, in ascending order of width / height, int64 (B, 2).
        max_upscaling: Maximum factor by which an image may be enlarged; images that need more are excluded. Defaults to None:
            no limit.
    """

    sizes: NDArray[np.int64]
    max_upscaling: float | None = None

    @classmethod
    def of(cls, resolution: int, buckets: AspectRatioBuckets | None, max_upscaling: float | None = None) -> Bucketing:
        """The sizes of ``buckets``, or only the square of ``resolution`` if ``buckets`` is None.

        Raises:
            UserError: If the resolution is not between 1 and ``MAX_RESOLUTION``, or not a multiple of the buckets' divisor.
        """
        check_resolution(resolution)
        sizes = np.array([[resolution, resolution]], np.int64) if buckets is None else buckets.sizes(resolution)
        return cls(sizes, max_upscaling)

    @property
    def needs_sizes(self) -> bool:
        """Whether :meth:`assign` depends on the sizes of the images."""
        return len(self.sizes) > 1 or self.max_upscaling is not None

    @property
    def digest(self) -> int:
        """A number that identifies these sizes and the limit."""
        return seed_of(str(self.sizes.tolist()), str(self.max_upscaling))

    @property
    def dtype(self) -> type[np.int16] | type[np.int32]:
        """Dtype of bucket numbers: numpy sorts 16 bits by radix, and 100 million samples make each byte felt."""
        return np.int16 if len(self.sizes) < 1 << 15 else np.int32

    def assign(self, width: NDArray[np.integer], height: NDArray[np.integer]) -> NDArray[np.integer]:
        """The bucket of each image: the one with the nearest aspect ratio, on a logarithmic scale.

        An image of unknown size (0) gets the bucket nearest to a square; reading it reports it as bad.

        Args:
            width: Widths of the images in pixels, (N,).
            height: Heights of the images in pixels, (N,).

        Returns:
            Rows of :attr:`sizes`, or ``LEFT_OUT``, :attr:`dtype` (N,).
        """
        if len(width) <= _BLOCK:
            return self._assign(width, height, by_cells=False)
        buckets = np.empty(len(width), self.dtype)
        for start in range(0, len(width), _BLOCK):
            block = slice(start, start + _BLOCK)
            buckets[block] = self._assign(width[block], height[block], by_cells=True)
        return buckets

    def _assign(self, width: NDArray[np.integer], height: NDArray[np.integer], by_cells: bool) -> NDArray[np.integer]:
        """The same; ``by_cells`` looks most ratios up in a table, which is worth it for many images."""
        known = (width > 0) & (height > 0)
        shown_width, shown_height = np.where(known, width, 1), np.where(known, height, 1)
        ratio = shown_width / shown_height
        if by_cells:
            bucket = self._cells[ratio.astype(np.float32).view(np.uint32) >> _CELL_BITS]
            unsure = np.flatnonzero(bucket == _UNSURE)
            bucket[unsure] = np.searchsorted(self._middles, np.log(ratio[unsure]))
        else:
            bucket = np.searchsorted(self._middles, np.log(ratio)).astype(self.dtype)
        if self.max_upscaling is not None:
            scale = np.maximum(self.sizes[bucket, 0] / shown_height, self.sizes[bucket, 1] / shown_width)
            bucket[known & (scale > self.max_upscaling)] = LEFT_OUT
        return bucket

    @cached_property
    def _middles(self) -> NDArray[np.float64]:
        """Logarithms of the aspect ratios that separate the buckets, ascending, float64 (B - 1,)."""
        ratios = np.log(self.sizes[:, 1] / self.sizes[:, 0])
        middles: NDArray[np.float64] = (ratios[1:] + ratios[:-1]) / 2
        return middles

    @cached_property
    def _cells(self) -> NDArray[np.integer]:
        """The bucket of all aspect ratios whose float32 starts with the same bits, or ``_UNSURE`` where there are several."""
        last = np.float32(np.inf).view(np.uint32) >> _CELL_BITS
        edges = (np.arange(int(last) + 1, dtype=np.uint32) << np.uint32(_CELL_BITS)).view(np.float32)
        with np.errstate(divide="ignore"):  # log(0)
            # A ratio just below an edge may be rounded to it.
            low = np.searchsorted(self._middles, np.log(np.nextafter(edges[:-1], np.float32(0)).astype(np.float64)))
            high = np.searchsorted(self._middles, np.log(edges[1:].astype(np.float64)))
        return np.where(low == high, low, _UNSURE).astype(self.dtype)
