"""One batch of a plan."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class GlobalBatch(NamedTuple):
    """One batch over all processes: G samples of one size.

    Attributes:
        samples: Sample numbers, int64 (G,).
        weights: 1 for a sample, 0 for padding, float32 (G,).
        slots: Numbers that identify each occurrence of a sample in the whole run, int64 (G,). A slot depends on the sample, the
            pass and the round, not on the batch, so random draws do not change when batches are composed differently. Padding
            has the slot of the sample that it repeats.
        size: Height and width in pixels.
        visit: Number of the visit to a chunk: pass times K plus the position in the pass.
    """

    samples: NDArray[np.int64]
    weights: NDArray[np.float32]
    slots: NDArray[np.int64]
    size: tuple[int, int]
    visit: int
