"""Random draws that depend on name and sample, not on earlier draws."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_lora.to_device import to_device

_MOST_IN_BATCH = 1 << 20
"""Slots of a batch of a loader that does not tell its batch size, as one of ready-made batches."""


def seed_of(*parts: int | str) -> int:
    """Derive a 63-bit seed from numbers and names; it is the same on every platform."""
    text = "/".join(str(part) for part in parts)
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little") >> 1
    )


class Draws:
    """Random numbers of one batch.

    Sample ``i`` of the batch draws from generators that are seeded by ``(seed, name, slots[i])``. A slot is the number
    of a sample's place in the run (pass, batch and position in the global batch in one integer), so a resumed
    run, other loader workers and another number of processes all see the same values. Values are drawn on the CPU, so
    that they do not depend on the device either.

    Args:
        seed: Seed of the run.
        slots: One integer per sample of the batch.
        device: Device of the returned tensors; defaults to the CPU.
    """

    def __init__(self, seed: int, slots: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.slots = slots
        self.device = torch.device(device)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal values, float32, ``(B, *shape)``."""
        values = [torch.randn(tuple(shape), generator=g) for g in self._generators(name)]
        return to_device(torch.stack(values), self.device)

    def uniform(self, name: str) -> Tensor:
        """Uniform values in [0, 1), float32, ``(B,)``."""
        return to_device(torch.stack([torch.rand((), generator=g) for g in self._generators(name)]), self.device)

    def integers(self, name: str, high: int) -> Tensor:
        """Integers in [0, high), int64, ``(B,)``."""
        values = [torch.randint(high, (), generator=g) for g in self._generators(name)]
        return to_device(torch.stack(values), self.device)

    def _generators(self, name: str) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed_of(self.seed, name, slot)) for slot in self.slots]


def slots_of(batch: Mapping[str, Any], batch_number: int, trainer: Any, loader_number: int = 0) -> list[int]:
    """Slots of a batch's samples, no two of which are equal; they are counted here if the datamodule does not number its samples.

    Args:
        batch: Batch with ``caption``, the captions of its samples.
        batch_number: Number of batches of each process before this one.
        trainer: Trainer of the run, in one of its loops.
        loader_number: Number of the batch's dataloader; defaults to 0.
    """
    if "slot" in batch:
        return list(batch["slot"])
    count = len(batch["caption"])
    first = (batch_number * trainer.world_size + trainer.global_rank) * _places(trainer, loader_number, count)
    return list(range(first, first + count))


def _places(trainer: Any, loader_number: int, count: int) -> int:
    """Number of slots that are kept for each batch of a loader: its batch size, since its last batch may be smaller."""
    if trainer.training:
        loaders = trainer.train_dataloader
    elif trainer.testing:
        loaders = trainer.test_dataloaders
    elif trainer.predicting:
        loaders = trainer.predict_dataloaders
    else:
        loaders = trainer.val_dataloaders
    loader = loaders[loader_number] if isinstance(loaders, list | tuple) else loaders
    # Lightning's loaders of predictions have a sampler of batches alone.
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) and size >= count else _MOST_IN_BATCH
