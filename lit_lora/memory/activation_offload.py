"""What the forward pass saves for the backward pass, in host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 256 << 10
"""Bytes below which a tensor is not worth a copy there and back."""

_Packed = Tensor | tuple[torch.device, Tensor]


class ActivationOffload(saved_tensors_hooks):
    """A context for the forward pass: what it saves for the backward pass goes to host memory, and back when it is needed.

    Unlike :class:`torch.autograd.graph.save_on_cpu` it leaves on the device what is there anyway (parameters) and what is small.
    With gradient checkpointing it is the inputs of the blocks that go. It can be entered again and again, also for several
    forward passes before a backward pass.

    Args:
        pin_memory: Lock the host memory, so that copies to and from a GPU run beside the host's work.
        smallest_bytes: Smaller tensors stay.
    """

    def __init__(self, pin_memory: bool, smallest_bytes: int = SMALLEST) -> None:
        super().__init__(self._pack, self._unpack)
        self.pin_memory = pin_memory
        self.smallest_bytes = smallest_bytes
        self.bytes_moved = 0
        """Of all tensors that went to host memory so far."""

    def _pack(self, tensor: Tensor) -> _Packed:
        if is_parameter(tensor):
            return tensor
        if tensor.nbytes < self.smallest_bytes or tensor.layout != torch.strided:
            # The tensor itself may be the operation's own output: the two would keep each other alive.
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
