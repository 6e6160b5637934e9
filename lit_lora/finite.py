"""Tests for NaN and Inf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
_QUICK = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""dtypes that the kernel of ``GradScaler`` takes."""

_DTYPES = (*_QUICK, *_FP8)


def any_non_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether any value in tensors of one device is NaN or Inf: a bool scalar on that device, without waiting for it.

    Of a ``DTensor`` only the process's own shard is looked at.
    """
    # torch computes nothing in fp8, whose values bfloat16 all has.
    local = [one.bfloat16() if one.dtype in _FP8 else one for one in map(_local, tensors) if one.numel()]
    if not local:
        return torch.tensor(False)
    # The largest magnitude of a tensor is NaN or Inf exactly if one of its values is.
    largest = torch._foreach_norm(local, ord=float("inf"))
    return ~torch.stack([value.float() for value in largest]).isfinite().all()


def any_non_finite_gradient(gradients: Sequence[Tensor]) -> Tensor:
    """As :func:`any_non_finite`, in a quarter of the time, for tensors that may be written: they are multiplied by 1."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in map(_local, gradients):
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    flags = []
    for dtype, some in by_dtype.items():
        if dtype not in _QUICK or any(one.layout is not torch.strided for one in some):
            flags.append(any_non_finite(some))
            continue
        found, factor = (torch.full((), value, device=some[0].device) for value in (0.0, 1.0))
        torch._amp_foreach_non_finite_check_and_unscale_(some, found, factor)  # as torch.amp.GradScaler does
        flags.append(found > 0)
    return torch.stack(flags).any() if flags else torch.tensor(False)


def fill_where(condition: Tensor, tensors: Sequence[Tensor], value: float) -> None:
    """Fill all tensors with a value, in place, if a bool scalar on their device is true; the host need not know it."""
    for tensor in tensors:
        _local(tensor).masked_fill_(condition, value)


def non_finite_names(tensors: Mapping[str, Any]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or Inf.

    Values of other kinds, quantized tensors among them, count as finite.
    """
    floats = {
        name: value.detach()
        for name, value in tensors.items()
        if type(value) in (Tensor, nn.Parameter, DTensor) and value.dtype in _DTYPES and not value.is_meta
    }
    by_device: dict[torch.device, list[Tensor]] = {}
    for value in floats.values():
        by_device.setdefault(value.device, []).append(value)
    # Each device is waited for once; single tensors are looked at only where there is something to find.
    if not any(bool(any_non_finite(values)) for values in by_device.values()):
        return []
    return [name for name, value in floats.items() if bool(any_non_finite([value]))]


def damaged_base(module: nn.Module) -> str:
    """What to do about frozen tensors of a module that hold NaN or Inf; empty if none does. It reads all of them."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    names = non_finite_names({name: value for name, value in named.items() if not value.requires_grad})
    if not names:
        return ""
    return f"replace the base's files: {len(names)} frozen tensors hold NaN or Inf, the first is {names[0]}"


def tensors_in(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors in nested dicts, lists and tuples, by their place such as ``"0.state.3.exp_avg"``."""
    if isinstance(state, Tensor):
        return {prefix: state}
    if isinstance(state, list | tuple):
        state = dict(enumerate(state))
    if not isinstance(state, Mapping):
        return {}
    below = [tensors_in(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in state.items()]
    return {name: tensor for tensors in below for name, tensor in tensors.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
