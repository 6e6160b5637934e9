"""The update of one layer as a product of two factors, which is never formed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrices ``up @ down`` of one layer, ``(g, m, n)``: one for each group of a grouped convolution, otherwise one.

    The kernel's dimensions of a convolution are part of ``n``. Singular values are those of the ``(k, k)`` core
    ``R_up R_down^T`` of the QR decompositions of ``up`` and ``down^T``, in float64.

    Args:
        up: ``(g, m, k)``, float64.
        down: ``(g, k, n)``, float64.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Number of components of each group."""
        return self.up.shape[-1]

    @property
    def most(self) -> int:
        """The largest rank that matrices of this shape can have."""
        return min(self.up.shape[-2], self.down.shape[-1])

    def scaled(self, factor: float) -> Self:
        """The update times a factor."""
        return type(self)(self.up * factor, self.down)

    @classmethod
    def total(cls, updates: Sequence[Self]) -> Self:
        """The sum of updates of the same layer; its rank is the sum of their ranks."""
        return cls(torch.cat([one.up for one in updates], -1), torch.cat([one.down for one in updates], -2))

    def singular_values(self) -> Tensor:
        """Singular values in falling order, ``(g, min(k, m, n))``."""
        upper = torch.linalg.qr(self.up, mode="r").R
        lower = torch.linalg.qr(self.down.mT, mode="r").R
        return torch.linalg.svdvals(upper @ lower.mT)

    def truncated(self, rank: int) -> Self:
        """The best approximation of a lower rank (Eckart and Young, 1936).

        Both factors get the square root of the singular values.

        Args:
            rank: Number of components of each group to keep.
        """
        upper, lower = torch.linalg.qr(self.up), torch.linalg.qr(self.down.mT)
        left, values, right = torch.linalg.svd(upper.R @ lower.R.mT, full_matrices=False)
        root = values[..., :rank].sqrt()
        up = upper.Q @ (left[..., :rank] * root[..., None, :])
        down = (right[..., :rank, :] * root[..., None]) @ lower.Q.mT
        return type(self)(up, down)

    def norm(self) -> float:
        """The Frobenius norm."""
        return float(self.singular_values().square().sum().sqrt())

    def inner(self, other: LowRank) -> float:
        """The inner product with another update of the same layer, ``trace(down_1^T up_1^T up_2 down_2)``."""
        return float(((self.up.mT @ other.up) * (self.down @ other.down.mT)).sum())


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch computes in one thread, for the small matrices of adapters.

    Threads wait for each other longer than they compute: on two busy cores a QR decomposition of ``(12288, 64)`` took 20 ms in
    one thread and 54 ms in two, and the eigenvalues of ``(64, 64)`` 1 ms and 68 ms.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
