"""Arrays that describe samples and their members."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SampleColumns:
    """Samples (N) and their members (M) as arrays, without a Python object for each sample.

    Attributes:
        key_bytes: Concatenated keys in UTF-8, uint8.
        key_ends: End of each key in ``key_bytes``, int64 (N,).
        width: Width of the image after the rotation by EXIF, in pixels, int32 (N,); 0 if there is no readable image.
        height: Height of the image, in the same way.
        member_sample: Number of the sample to which a member belongs, ascending, int64 (M,).
        member_extension: Number of the member's extension in ``scan.EXTENSIONS``, uint8 (M,).
        member_offset: Offset of the member's data in the shard, in bytes, int64 (M,).
        member_size: Size of the member's data, in bytes, int64 (M,).
    """

    key_bytes: NDArray[np.uint8]
    key_ends: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    member_sample: NDArray[np.int64]
    member_extension: NDArray[np.uint8]
    member_offset: NDArray[np.int64]
    member_size: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, sample: int) -> str:
        """The key of a sample."""
        start = self.key_ends[sample - 1] if sample else 0
        return self.key_bytes[start : self.key_ends[sample]].tobytes().decode("utf-8", "surrogateescape")
