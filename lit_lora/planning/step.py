"""Simulates one training step under a meter."""

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
from lit_lora.planning.processes import Share
from lit_lora.planning.storage_meter import StorageMeter

_CUDA_GRANULARITY = 512
"""CUDA's caching allocator rounds the size of every tensor up to a multiple of this many bytes."""


_ALL = Share()


def make_meter(cuda: bool) -> StorageMeter:
    """A meter that also counts temporary memory inside operations, on CUDA or on the CPU."""
    return StorageMeter(inside_cuda if cuda else inside_cpu, _CUDA_GRANULARITY if cuda else 1)


def simulate_step(
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
    share: Share = _ALL,
    freed_after_step: bool = True,
) -> object:
    """Simulate a step from the middle of a run, where the optimizer's state exists.

    Args:
        meter: Meter that records the phases ``forward``, ``backward`` and ``optimizer``; it is not active yet.
        trained: Trained parameters, which the meter already counts as ``adapter``.
        loss: Function that runs the forward pass and returns the loss.
        make_optimizer: Function from trained parameters to their optimizer.
        clip: Whether gradients are clipped by their norm.
        accumulate: Whether gradients are kept from one batch to the next.
        in_backward: Whether each parameter is stepped as soon as its gradient is complete, and the gradient is freed then.
        offload_activations: Whether tensors saved for the backward pass are kept in host memory.
        cuda: Whether the optimizer updates all parameters at once, as torch does on CUDA by default.
        share: What the process has of gradients and optimizer state; defaults to all.
        freed_after_step: Whether gradients are freed after the optimizer's step, as by ``LoraDiffusion``; Lightning itself keeps
            them for the next forward pass. Defaults to True.

    Returns:
        An object that keeps the optimizer's state alive.
    """
    if share.keeps_gradients and share.stepped is not None:
        _make_gradients(meter, trained)
    stepped = trained if share.stepped is None else share.stepped
    step = _optimizer_step(meter, stepped, make_optimizer, cuda)

    def ready(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.assign([parameter.grad], "gradients")
        if in_backward or not share.keeps_gradients:
            parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(ready) for parameter in trained]
    if in_backward:
        _forget_gradients(trained)
    with meter, _saved_on_host() if offload_activations else nullcontext():
        if freed_after_step and not accumulate:
            _forget_gradients([*trained, *stepped])
        meter.begin("forward")
        value = loss()
        if not accumulate:
            _forget_gradients([*trained, *stepped])
        meter.begin("backward")
        meter.adjust_all(share.backward)
        _backward(value)
        del value
        meter.adjust_all({kind: -size for kind, size in (share.gathered | share.backward).items()})
        meter.begin("optimizer")
        if share.stepped is not None and share.stepped[0].grad is None:
            _make_gradients(meter, stepped)
        meter.kind = "other"
        if clip and not in_backward:
            torch.nn.utils.clip_grad_norm_(stepped, 1.0)
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
    """Allocate optimizer state and gradients, and return the optimizer's step function."""
    _make_gradients(meter, trained)
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
        except RuntimeError:  # it read values, which fake tensors do not have
            optimizer.state.clear()
        else:
            meter.assign(tensors_of(dict(optimizer.state)), "optimizer state")
            return optimizer.step
    meter.adjust("optimizer state", measured_state(make_optimizer, trained))
    largest = max(parameter.nbytes for parameter in trained)
    # One parameter at a time: its update in float32, and a square root.
    return lambda: torch.empty(2 * largest, dtype=torch.uint8)


def _make_gradients(meter: StorageMeter, parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        meter.assign([parameter.grad], "gradients")


def _backward(loss: Tensor) -> None:
    """``loss.backward()``, but with modes such as ``CudaSemantics`` active also while activations are recomputed."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _saved_on_host() -> Iterator[None]:
    """A context in which tensors saved for the backward pass leave the device and return as new tensors."""

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
