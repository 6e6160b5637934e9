"""Tensors in page-locked host memory, from which a GPU copies without the processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_ALIGNMENT = 256
"""Bytes of which an address is a multiple."""

_LARGEST = 256 << 20
"""Bytes of a piece of memory that holds several tensors; larger pieces would leave less unused, and take longer to find."""


def aligned_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a piece of memory, in which the next one begins at an aligned address."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def page_locked(
    tensors: Sequence[Tensor], allocate: Callable[[int], Tensor] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Copy tensors to page-locked memory, one after another, so that the caller can free each of them at once.

    Torch rounds each page-locked tensor up to a power of two, which takes 1.6 times the memory of FLUX.1's weights. Here tensors
    lie side by side in pieces whose sizes are powers of two.

    Args:
        tensors: Tensors in host memory.
        allocate: Function from a number of bytes to a uint8 tensor of this size; defaults to torch's page-locked memory.

    Yields:
        The index of a tensor and its copy, with the same strides if it is dense.

    Raises:
        RuntimeError: If the system cannot lock that much memory.
    """
    waiting = dict(enumerate(tensors))
    del tensors  # a tensor that was copied is not kept
    remaining = sum(map(aligned_bytes, waiting.values()))
    pieces: list[Tensor] = []  # what is left of each
    for index in sorted(waiting, key=lambda index: -waiting[index].nbytes):
        size = aligned_bytes(waiting[index])
        place = next((number for number, piece in enumerate(pieces) if len(piece) >= size), None)
        if place is None:
            place = len(pieces)
            pieces.append((allocate or _allocate)(max(_power_above(size), min(_LARGEST, _power_below(remaining)))))
        taken, pieces[place] = pieces[place][:size], pieces[place][size:]
        remaining -= size
        yield index, _copy(waiting.pop(index), taken)


def _copy(tensor: Tensor, memory: Tensor) -> Tensor:
    like = torch.empty_like(tensor, device="meta")
    copy = memory[: tensor.nbytes].view(tensor.dtype).as_strided(like.shape, like.stride())
    return copy.copy_(tensor)


def _allocate(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _power_above(size: int) -> int:
    return 1 << (max(size, 1) - 1).bit_length()


def _power_below(size: int) -> int:
    return 1 << (max(size, 1).bit_length() - 1)
