"""How often each round shows the samples of each of several sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_lora.draws import seed_of


@dataclass(frozen=True, eq=False)
class Repeats:
    """The number of times that a round shows the samples of each set (S).

    A set of n samples with 2.5 repeats is shown round(2.5 n) times in each round: every sample twice, and a part of them once
    more. The part moves on from round to round, so that all samples are shown equally often in the long run.

    Attributes:
        times: Repeats of each set, float64 (S,).
        set_of_shard: Number of the set of each shard, int64.
        shares: Share of each set in a round, float64 (S,), for which :meth:`resolved` gives the repeats; NaN for sets whose
            repeats are given. Defaults to None: all are given.
    """

    times: NDArray[np.float64]
    set_of_shard: NDArray[np.int64]
    shares: NDArray[np.float64] | None = None

    @classmethod
    def once(cls, num_shards: int) -> Repeats:
        """One set, shown once."""
        return cls(np.ones(1), np.zeros(num_shards, np.int64))

    @property
    def whole(self) -> NDArray[np.int64]:
        """Number of times that all samples of each set are shown, int64 (S,)."""
        return np.floor(self.times).astype(np.int64)

    @property
    def copies(self) -> int:
        """Most times that a round shows a sample."""
        return int(np.ceil(self.times).max())

    @property
    def digest(self) -> int | None:
        """A number that identifies the repeats; None if every sample is shown once."""
        if np.array_equal(self.times, np.ones_like(self.times)):
            return None
        return seed_of(str(self.times.tolist()), str(self.set_of_shard.tolist()))

    def resolved(self, counts: NDArray[np.int64]) -> Repeats:
        """The same with repeats in place of shares.

        Sets with repeats show N samples in a round. Where the shares add up to S, a set with a share s shows s N / (1 - S) of
        them, rounded, so that the round is as large as shares and repeats ask for together.

        Args:
            counts: Number of samples in each set, int64 (S,).
        """
        if self.shares is None:
            return self
        given = np.isnan(self.shares)
        shown = np.floor(self.times[given] * counts[given] + 0.5).sum()
        wanted = np.floor(self.shares * shown / (1 - np.nansum(self.shares)) + 0.5)
        times = np.where(given, self.times, wanted / np.maximum(counts, 1))
        return Repeats(times, self.set_of_shard)

    def parts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of samples that are shown once more than :attr:`whole`, in each set and group.

        A set's number is distributed over the groups in proportion to their samples, by largest remainders.

        Args:
            counts: Number of samples in each set and group, int64 (S, G).

        Returns:
            int64 (S, G), at most ``counts``.
        """
        parts = np.zeros_like(counts)
        for number, (times, whole) in enumerate(zip(self.times.tolist(), self.whole.tolist(), strict=True)):
            samples = int(counts[number].sum())
            wanted = int(np.floor(times * samples + 0.5)) - whole * samples
            if wanted:
                parts[number], remainders = np.divmod(counts[number] * wanted, samples)
                left = wanted - int(parts[number].sum())
                parts[number, np.argsort(-remainders, kind="stable")[:left]] += 1
        return parts
