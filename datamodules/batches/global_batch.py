"""One batch of a plan."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class GlobalBatch(NamedTuple):
    """One batch over all processes, G samples of one size.

    Attributes:
        samples: Sample numbers, int64 (G,).
        weights: 1 for a sample, 0 for one that only fills the batch up, float32 (G,).
        slots: A number for each showing of a sample in the whole run, int64 (G,). It depends on the sample, the pass
            and the repeat within the pass, not on the batch; so what is drawn for it stays the same when batches are
            made up differently. Samples that fill up share the slot of the sample that they repeat.
        size: Height and width in pixels.
        visit: The number of the visit to a chunk: pass times K plus the position in the pass.
    """

    samples: NDArray[np.int64]
    weights: NDArray[np.float32]
    slots: NDArray[np.int64]
    size: tuple[int, int]
    visit: int
