"""State of an optimizer without taking a step on the real parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_lora.errors import UserError

_LARGEST = 1 << 20
"""Elements of the largest parameter that is tried; beyond, state grows with the parameter."""


def measured_state(make: Any, parameters: Sequence[Tensor]) -> int:
    """Bytes that an optimizer keeps for these parameters, from steps on small real ones of the same shapes.

    For optimizers that look at values or call libraries, which tensors without contents do not allow.

    Args:
        make: Makes the optimizer of a list of parameters.
        parameters: What is to be trained; only shapes are looked at.

    Raises:
        UserError: The optimizer cannot take a step on this machine.
    """
    total = 0.0
    for shape, count in Counter(tuple(parameter.shape) for parameter in parameters).items():
        with unset_fake_temporarily(), torch.enable_grad():
            total += count * _of_one(make, shape)
    return int(total)


def tensors_of(state: Any) -> list[Tensor]:
    """All tensors in a nested state, those inside tensor subclasses too."""
    if isinstance(state, Tensor):
        if is_traceable_wrapper_subclass(state):
            return [inner for name in state.__tensor_flatten__()[0] for inner in tensors_of(getattr(state, name))]
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    if isinstance(state, list | tuple):
        return [tensor for value in state for tensor in tensors_of(value)]
    return []


def _of_one(make: Any, shape: tuple[int, ...]) -> float:
    size = torch.Size(shape)
    scale = max(1.0, size.numel() / _LARGEST)
    if scale > 1:
        size = torch.Size([_LARGEST // 256, 256])
    parameter = nn.Parameter(torch.zeros(size))
    parameter.grad = torch.zeros(size)
    optimizer = make([parameter])
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise UserError(
            f"{type(optimizer).__name__} cannot take a step on this machine's CPU, so that its memory is not known "
            f"({str(error).splitlines()[0]}); plan with torch.optim.AdamW, which takes at least as much"
        ) from error
    return scale * sum(tensor.nbytes for tensor in {id(t): t for t in tensors_of(dict(optimizer.state))}.values())
