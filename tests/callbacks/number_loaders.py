"""Loaders of random numbers that keep their position, or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.values = torch.randn(count, 3, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return self.values[index]


class Rest(DataLoader[Tensor]):
    """Leaves out the batches that a run had before."""

    taken = 0

    def __iter__(self) -> Any:
        taken, self.taken = self.taken, 0
        return (batch for number, batch in enumerate(super().__iter__()) if number >= taken)


class Keeping(Rest):
    """A loader that keeps its position. Saved after its last batch, its next iteration has none."""

    given = 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["given"]

    def __iter__(self) -> Any:
        self.given = self.taken
        for batch in super().__iter__():
            self.given += 1
            yield batch
