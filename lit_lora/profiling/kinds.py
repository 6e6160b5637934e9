"""Kinds of memory: what its bytes are used for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

KINDS = ("frozen weights", "adapter", "gradients", "optimizer state", "activations", "other")
"""All kinds; every byte belongs to exactly one."""

_PLAIN = (Tensor, nn.Parameter)  # the fast path, for nearly all tensors


class MemoryKinds:
    """Counts the bytes of a module's weights, gradients and optimizer state on one device.

    A storage that several tensors share is counted once, as the first kind in the order of :data:`KINDS`. Tensors that consist
    of other tensors (8-bit optimizer states, sharded parameters) are counted as these.

    Args:
        module: Module to count. Frozen parameters and buffers are counted by the constructor, the others by :meth:`count`.
        optimizers: Optimizers of the module.
        device: Device whose memory is counted.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Any], device: torch.device) -> None:
        parameters = list(module.parameters())
        self._frozen = [p for p in parameters if not p.requires_grad] + list(module.buffers())
        self._trained = [p for p in parameters if p.requires_grad]
        self._states = [optimizer.state for optimizer in optimizers if hasattr(optimizer, "state")]
        self._device = device
        self._frozen_storages: set[int] = set()
        self._frozen_bytes = self._bytes(self._frozen, self._frozen_storages)

    def count(self) -> dict[str, int]:
        """Bytes of frozen weights, adapter, gradients and optimizer state."""
        seen = set(self._frozen_storages)
        gradients = (p.grad for p in self._trained if p.grad is not None)
        return {
            "frozen weights": self._frozen_bytes,
            "adapter": self._bytes(self._trained, seen),
            "gradients": self._bytes(gradients, seen),
            "optimizer state": self._bytes(tensors_in(self._states), seen),
        }

    def full_precision(self) -> dict[str, int]:
        """Sizes of tensors that could be stored in fewer bits.

        Returns:
            Bytes of frozen weights and of optimizer state with 16 or more bits per element, and the number of ``frozen
            elements`` among them.
        """
        wide = [tensor for tensor in self._frozen if _is_wide(tensor)]
        return {
            "frozen weights": self._bytes(wide, set()),
            "frozen elements": sum(tensor.numel() for tensor in wide if self._is_here(tensor)),
            "optimizer state": self._bytes((t for t in tensors_in(self._states) if _is_wide(t)), set()),
        }

    def _bytes(self, tensors: Iterable[Tensor], seen: set[int]) -> int:
        total = 0
        for tensor in tensors:
            for part in parts_of(tensor):
                if self._is_here(part) and (storage := part.untyped_storage())._cdata not in seen:
                    seen.add(storage._cdata)
                    total += storage.nbytes()
        return total

    def _is_here(self, tensor: Tensor) -> bool:
        device = tensor.device
        return device.type == self._device.type and (device.type == "cpu" or device.index == self._device.index)


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, the parts of a tensor subclass, and the shard that DeepSpeed adds."""
    if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a sharded parameter also has its mesh here
                yield from parts_of(part)
    else:
        yield tensor
        if isinstance(shard := getattr(tensor, "ds_tensor", None), Tensor):
            yield shard


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


def _is_wide(tensor: Tensor) -> bool:
    # torchao's states claim float32, but consist of bytes.
    return tensor.is_floating_point() and all(part.element_size() >= 2 for part in parts_of(tensor) if part.numel() > 1)
