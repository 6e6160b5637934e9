"""Which samples make which batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_lora.errors import UserError

_ORDER = 1  # keeps these permutations apart from others that are drawn from the same seed


class GlobalBatch(NamedTuple):
    """One batch over all processes, G samples.

    Attributes:
        samples: Sample numbers, int64 (G,).
        weights: 1 for a sample, 0 for one that only fills the batch up, float32 (G,).
        slots: The number of each place in the whole run, int64 (G,).
    """

    samples: NDArray[np.int64]
    weights: NDArray[np.float32]
    slots: NDArray[np.int64]


class Plan:
    """The batches of every pass over the data, as a pure function of the arguments.

    Nothing depends on the number of processes or loader workers, so a run can change both and go on.

    Args:
        num_samples: The number of samples.
        global_batch_size: Samples in a batch over all processes, G.
        seed: Decides the order.
        shuffle: Draw a new order for each pass; otherwise samples keep their order.
        leftovers: What happens to samples that do not fill a batch. ``"drop"`` leaves them out of the pass, ``"pad"``
            fills their batch up with samples of weight 0.

    Raises:
        UserError: There are no samples, or too few for one batch where leftovers are dropped.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        leftovers: Literal["drop", "pad"] = "drop",
    ) -> None:
        if num_samples < 1:
            raise UserError("there are no samples to plan batches of; add data")
        if leftovers == "drop" and num_samples < global_batch_size:
            raise UserError(
                f"{num_samples} samples do not fill one batch of {global_batch_size}"
                " (batch_size times the number of processes);"
                " lower batch_size, use fewer processes or add data"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.leftovers = leftovers
        self._order_of_pass: tuple[int, NDArray[np.int64]] | None = None

    @property
    def batches_per_pass(self) -> int:
        """The number of batches in a pass."""
        full, rest = divmod(self.num_samples, self.global_batch_size)
        return full + (rest > 0 and self.leftovers == "pad")

    def batch(self, pass_number: int, batch_number: int) -> GlobalBatch:
        """The batch with this number, from 0, in the pass with this number, from 0."""
        size = self.global_batch_size
        places = batch_number * size + np.arange(size)
        samples = self._order(pass_number)[places % self.num_samples]
        weights = (places < self.num_samples).astype(np.float32)
        return GlobalBatch(samples, weights, pass_number * self.batches_per_pass * size + places)

    def _order(self, pass_number: int) -> NDArray[np.int64]:
        if self._order_of_pass is None or self._order_of_pass[0] != pass_number:
            if self.shuffle:
                order = np.random.default_rng([self.seed, _ORDER, pass_number]).permutation(self.num_samples)
            else:
                order = np.arange(self.num_samples)
            self._order_of_pass = (pass_number, order)
        return self._order_of_pass[1]
