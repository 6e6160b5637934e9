"""Collation of samples into a batch, one by one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info


class BatchBuilder:
    """A batch of B rows, filled one by one; threads may fill different rows at the same time.

    Each tensor is copied into the batch at once. This frees the memory of a decoded image for the next one. The batch has the
    memory layout of the sample in the lowest row and so keeps channels last; reordering the channels here would take four times
    as long as the copy.

    Args:
        batch_size: Number of rows, B.
    """

    def __init__(self, batch_size: int) -> None:
        self.places: list[int] = []
        self._batch_size = batch_size
        self._batch: dict[str, Any] = {}
        self._lock = threading.Lock()

    def put(self, place: int, sample: Mapping[str, Any]) -> None:
        """Fill a row: tensors and tuples of integers become rows of one tensor, other values elements of a list."""
        self._put(self._batch, place, sample)
        self.places.append(place)

    def finish(self) -> dict[str, Any]:
        """The batch; copies of the sample in the lowest row fill the empty rows."""
        batch = _of_rows(self._batch)
        for place in set(range(self._batch_size)) - set(self.places):
            _repeat(batch, min(self.places), place)
        return {name: _as_tensor(values) for name, values in batch.items()}

    def _put(self, batch: dict[str, Any], place: int, sample: Mapping[str, Any]) -> None:
        for name, value in sample.items():
            if isinstance(value, Tensor):
                with self._lock:
                    if name not in batch:
                        batch[name] = _Rows(place, value, self._batch_size)
                    row = batch[name].row(place, value)
                assert row.shape == value.shape, f"{name}: {tuple(value.shape)} after {tuple(row.shape)}"
                row.copy_(value)
            elif isinstance(value, dict):
                self._put(batch.setdefault(name, {}), place, value)
            else:
                batch.setdefault(name, [None] * self._batch_size)[place] = value


class _Rows:
    """Rows of a tensor, which get the memory layout of the value in the lowest row, whichever thread comes first."""

    def __init__(self, place: int, value: Tensor, count: int) -> None:
        self._order = self._lowest_order = _memory_order(value)
        self._lowest = place
        self._rows = _empty_rows(value, self._order, count)

    def row(self, place: int, value: Tensor) -> Tensor:
        """The row for a value."""
        if place < self._lowest:
            self._lowest, self._lowest_order = place, _memory_order(value)
        return self._rows[place]

    def tensor(self) -> Tensor:
        """The rows, all of which are filled."""
        if self._lowest_order == self._order:
            return self._rows
        return _empty_rows(self._rows[0], self._lowest_order, len(self._rows)).copy_(self._rows)


def _of_rows(batch: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in batch.items():
        if isinstance(values, dict):
            found[name] = _of_rows(values)
        else:
            found[name] = values.tensor() if isinstance(values, _Rows) else values
    return found


def _as_tensor(values: Any) -> Any:
    """Tuples of integers as one int64 tensor; one tensor per tuple would take longer than all other work."""
    return torch.tensor(values) if isinstance(values, list) and isinstance(values[0], tuple) else values


def _repeat(batch: dict[str, Any], source: int, place: int) -> None:
    for rows in batch.values():
        if isinstance(rows, dict):
            _repeat(rows, source, place)
        else:
            rows[place] = rows[source]


def _memory_order(value: Tensor) -> list[int]:
    """The dimensions of a tensor from the outermost to the innermost in memory."""
    strides = value.stride()
    return sorted(range(value.ndim), key=lambda dim: -strides[dim])


def _empty_rows(value: Tensor, order: list[int], count: int) -> Tensor:
    """Rows with the shape of ``value``, whose dimensions are in this order in memory."""
    shape = (count, *(value.shape[dim] for dim in order))
    nbytes = value.element_size() * value.numel() * count
    if get_worker_info() is not None:
        # As in torch's default_collate, since other tensors would be copied to shared memory when the batch is sent.
        storage = torch.UntypedStorage._new_shared(nbytes, device="cpu")
        rows = torch.empty(0, dtype=value.dtype).set_(storage).view(shape)
    elif torch.cuda.is_available():
        rows = torch.empty(shape, dtype=value.dtype, pin_memory=True)  # its allocator reuses memory by itself
    elif nbytes < _LARGE_BYTES:
        rows = torch.empty(shape, dtype=value.dtype)
    else:
        rows = torch.from_numpy(_MEMORY.take(nbytes)).view(value.dtype).view(shape)
    return rows.permute(0, *(1 + order.index(dim) for dim in range(value.ndim)))


class _ReusedMemory:
    """Memory of large batches, reused when a batch has been freed, since new pages cost more than the copy into them.

    A tensor and all its views refer to the array that holds their memory, so the array's reference count shows whether any of
    them still exists.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """An array of ``nbytes`` bytes that nothing else refers to."""
        with self._lock:
            unused = [sys.getrefcount(self._arrays[place]) == _UNUSED for place in range(len(self._arrays))]
            for place, is_unused in enumerate(unused):
                if is_unused and nbytes <= self._arrays[place].nbytes <= 2 * nbytes:
                    return self._arrays[place][:nbytes]
            # Unused arrays of other sizes are freed, so that no more memory is kept than is in use at once.
            self._arrays = [array for array, is_unused in zip(self._arrays, unused, strict=True) if not is_unused]
            self._arrays.append(np.empty(nbytes, np.uint8))
            return self._arrays[-1][:nbytes]


def _count_unused() -> int:
    """The result of :func:`sys.getrefcount` for an array that only a list refers to."""
    arrays = [np.empty(1)]
    return sys.getrefcount(arrays[0])


_LARGE_BYTES = 1 << 18
_UNUSED = _count_unused()
_MEMORY = _ReusedMemory()
