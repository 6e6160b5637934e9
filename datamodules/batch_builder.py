"""Samples put together to a batch, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class BatchBuilder:
    """A batch of B places, filled one by one.

    A tensor is copied into the batch's own at once, in the order of dimensions that it has in memory. So the memory of a
    decoded image is free for the next one, and its channels stay last: to turn them here would take four times as long
    as the copy.

    Args:
        batch_size: B.
    """

    def __init__(self, batch_size: int) -> None:
        self.places: list[int] = []
        self._batch_size = batch_size
        self._batch: dict[str, Any] = {}

    def put(self, place: int, sample: Mapping[str, Any]) -> None:
        """Fill a place; tensors become rows of one tensor, other values entries of a list."""
        self._put(self._batch, place, sample)
        self.places.append(place)

    def finish(self) -> dict[str, Any]:
        """The batch; what was put first stands in for the places that are not filled."""
        for place in set(range(self._batch_size)) - set(self.places):
            _repeat(self._batch, self.places[0], place)
        return self._batch

    def _put(self, batch: dict[str, Any], place: int, sample: Mapping[str, Any]) -> None:
        for name, value in sample.items():
            if isinstance(value, Tensor):
                if name not in batch:
                    batch[name] = _empty_rows(value, self._batch_size)
                row = batch[name][place]
                assert row.shape == value.shape, f"{name}: {tuple(value.shape)} after {tuple(row.shape)}"
                row.copy_(value)
            elif isinstance(value, dict):
                self._put(batch.setdefault(name, {}), place, value)
            else:
                batch.setdefault(name, [None] * self._batch_size)[place] = value


def _repeat(batch: dict[str, Any], source: int, place: int) -> None:
    for rows in batch.values():
        if isinstance(rows, dict):
            _repeat(rows, source, place)
        else:
            rows[place] = rows[source]


def _empty_rows(value: Tensor, count: int) -> Tensor:
    """Rows like ``value`` in shape and memory layout; in a loader worker in the memory that it shares."""
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda dim: -strides[dim])
    shape = (count, *(value.shape[dim] for dim in order))
    if get_worker_info() is None:
        rows = torch.empty(shape, dtype=value.dtype)
    else:
        # As in torch's default_collate: otherwise all would be copied there when the batch is handed over.
        storage = torch.UntypedStorage._new_shared(value.element_size() * value.numel() * count, device="cpu")
        rows = torch.empty(0, dtype=value.dtype).set_(storage).view(shape)
    return rows.permute(0, *(1 + order.index(dim) for dim in range(value.ndim)))
