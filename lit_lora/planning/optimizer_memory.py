"""Memory of an optimizer's state, measured on small stand-in parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lit_lora.errors import UserError
from lit_lora.profiling.kinds import parts_of, tensors_in

_LARGEST = 1 << 20
"""Elements of the largest stand-in; for larger parameters the state is scaled up in proportion."""


def measured_state(make: Any, parameters: Sequence[Tensor]) -> int:
    """Bytes of the state that an optimizer keeps for these parameters.

    They are measured by real steps on one and on two parameters of each shape: optimizers that read values or call libraries
    cannot step tensors without contents.

    Args:
        make: Function from parameters to their optimizer.
        parameters: Trained parameters, of which only the shapes matter.

    Raises:
        UserError: If the optimizer cannot take a step on this machine.
    """
    total = shared = 0.0
    for shape, count in Counter(tuple(parameter.shape) for parameter in parameters).items():
        with unset_fake_temporarily(), torch.enable_grad():
            one, two = _state_of(make, shape, 1), _state_of(make, shape, 2)
        size = torch.Size(shape).numel()
        total += count * (two - one) * max(1.0, size / _LARGEST)
        shared = max(shared, 2 * one - two)  # such as the tables of an 8-bit optimizer
    return int(total + shared)


def tensors_of(state: Any) -> list[Tensor]:
    """All tensors in a nested state; tensor subclasses are replaced by the tensors that they consist of."""
    return [part for tensor in tensors_in(state) for part in parts_of(tensor)]


def _state_of(make: Any, shape: tuple[int, ...], count: int) -> int:
    """Bytes of the state of ``count`` parameters of this shape, or of the largest stand-in."""
    size = torch.Size(shape) if torch.Size(shape).numel() <= _LARGEST else torch.Size([_LARGEST // 256, 256])
    parameters = [nn.Parameter(torch.zeros(size)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.zeros(size)
    optimizer = make(parameters)
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise UserError(
            f"{type(optimizer).__name__} cannot take a step on this machine's CPU, so its memory is unknown "
            f"({str(error).splitlines()[0]}); plan with torch.optim.AdamW, which needs at least as much"
        ) from error
    return sum(
        tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors_of(dict(optimizer.state))}.values()
    )
