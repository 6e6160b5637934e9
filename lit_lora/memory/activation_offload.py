"""Keeps activations in host memory between the forward and the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 256 << 10
"""Smallest tensor, in bytes, that is worth a copy to the host and back."""

_Packed = Tensor | tuple[torch.device, Tensor]


class ActivationOffload(saved_tensors_hooks):
    """A context for the forward pass that moves tensors saved for the backward pass to host memory until they are needed.

    Unlike :class:`torch.autograd.graph.save_on_cpu` it does not move small tensors, nor parameters, which are on the device
    anyway. With gradient checkpointing it moves the inputs of the blocks. The context can be entered repeatedly, also for
    several forward passes before a backward pass.

    Args:
        pin_memory: Whether to use page-locked host memory, so that copies to and from a GPU are asynchronous.
        smallest_bytes: Smallest tensor, in bytes, that is moved; defaults to 256 KiB.
    """

    def __init__(self, pin_memory: bool, smallest_bytes: int = SMALLEST) -> None:
        super().__init__(self._pack, self._unpack)
        self.pin_memory = pin_memory
        self.smallest_bytes = smallest_bytes
        self.bytes_moved = 0
        """Bytes of all tensors that were moved to host memory."""

    def _pack(self, tensor: Tensor) -> _Packed:
        if is_parameter(tensor):
            return tensor
        if tensor.nbytes < self.smallest_bytes or tensor.layout != torch.strided:
            # The tensor may be the operation's own output: a reference to it would keep both alive.
            return tensor.detach()
        self.bytes_moved += tensor.nbytes
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.pin_memory)
        host.copy_(tensor, non_blocking=self.pin_memory)
        return tensor.device, host

    def _unpack(self, packed: _Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=self.pin_memory)


def is_parameter(tensor: Any) -> bool:
    """Whether the tensor is a parameter or a view of one, as the transposed weight of a Linear layer is."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
