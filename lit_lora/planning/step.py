"""Plays one training step under a meter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lit_lora.memory.activation_offload import SMALLEST, is_parameter
from lit_lora.planning.kernel_memory import inside_cpu, inside_cuda
from lit_lora.planning.optimizer_memory import measured_state, tensors_of
from lit_lora.planning.storage_meter import StorageMeter

_CUDA_GRANULARITY = 512
"""Bytes to which CUDA's caching allocator rounds every tensor up."""


def make_meter(cuda: bool) -> StorageMeter:
    """A meter that also counts the temporary memory of the device's operations."""
    return StorageMeter(inside_cuda if cuda else inside_cpu, _CUDA_GRANULARITY if cuda else 1)


def play_steps(
    meter: StorageMeter,
    trained: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    *,
    clip: bool = False,
    accumulate: bool = False,
    in_backward: bool = False,
    offload_activations: bool = False,
    cuda: bool = False,
) -> object:
    """Play a step from the middle of a run, in which optimizer state and the previous gradients exist.

    Args:
        meter: Meter that records the phases ``forward``, ``backward`` and ``optimizer``; it is not active yet.
        trained: Trained parameters, which the meter counts as ``adapter`` already.
        loss: Function that runs the forward pass and returns the loss.
        make_optimizer: Function from trained parameters to their optimizer.
        clip: Whether gradients are clipped by their norm.
        accumulate: Whether gradients are kept from one batch to the next.
        in_backward: Whether each parameter is stepped as soon as its gradient is complete, and the gradient freed.
        offload_activations: Whether tensors saved for the backward pass wait in host memory.
        cuda: Whether the optimizer works on all parameters at once, as it does on CUDA by default.

    Returns:
        An object that keeps the optimizer's state alive.
    """
    step = _optimizer_step(meter, trained, make_optimizer, cuda)

    def ready(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.assign([parameter.grad], "gradients")
        if in_backward:
            parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(ready) for parameter in trained]
    if in_backward:
        _forget_gradients(trained)
    with meter, _saved_on_host() if offload_activations else nullcontext():
        meter.begin("forward")
        value = loss()
        if not accumulate:
            _forget_gradients(trained)
        meter.begin("backward")
        _backward(value)
        del value
        meter.begin("optimizer")
        meter.kind = "other"
        if clip and not in_backward:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if not in_backward:
            step()
        meter.kind = "activations"
        meter.begin(None)
    for hook in hooks:
        hook.remove()
    return step


def _optimizer_step(
    meter: StorageMeter,
    trained: Sequence[nn.Parameter],
    make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    cuda: bool,
) -> Callable[[], object]:
    """The optimizer's step function, with optimizer state and gradients in place."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        meter.assign([parameter.grad], "gradients")
    with unset_fake_temporarily():
        kind = type(make_optimizer([nn.Parameter(torch.zeros(1))]))
    if kind.__module__.startswith("torch.optim"):
        optimizer = make_optimizer(trained)
        if cuda:
            for group in optimizer.param_groups:
                if not group.get("fused") and group.get("foreach", False) is None:
                    group["foreach"] = True
        try:
            optimizer.step()
        except RuntimeError:  # it reads values, which fake tensors do not have
            optimizer.state.clear()
        else:
            meter.assign(tensors_of(dict(optimizer.state)), "optimizer state")
            return optimizer.step
    meter.adjust("optimizer state", measured_state(make_optimizer, trained))
    largest = max(parameter.nbytes for parameter in trained)
    return lambda: torch.empty(
        2 * largest, dtype=torch.uint8
    )  # the update of one parameter, in float32, and a square root


def _backward(loss: Tensor) -> None:
    """``loss.backward()``, except that modes such as ``CudaSemantics`` stay active, also while activations are recomputed."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _saved_on_host() -> Iterator[None]:
    """Context in which tensors saved for the backward pass leave the device and come back as new tensors."""

    def pack(tensor: Tensor) -> Any:
        if is_parameter(tensor) or tensor.nbytes < SMALLEST:
            return tensor.detach()
        return tensor.size(), tensor.stride(), tensor.dtype

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        size, stride, dtype = packed
        return torch.empty_strided(size, stride, dtype=dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
