"""One step of a training, watched by a meter."""

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
"""Bytes that CUDA's caching allocator rounds every tensor up to."""


def make_meter(cuda: bool) -> StorageMeter:
    """A meter with what operations of the device take inside."""
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
    """Let the meter see a step of a run that goes on: the optimizer has its state, the last gradients are there.

    Args:
        meter: Gets the phases ``forward``, ``backward`` and ``optimizer``; it is not on yet.
        trained: What is trained, counted as ``adapter`` already.
        loss: The forward pass.
        make_optimizer: Makes the optimizer of the trained parameters.
        clip: Whether the gradients' norm is clipped.
        accumulate: Whether gradients are kept from one batch to the next.
        in_backward: Whether the optimizer steps as soon as a gradient is complete and lets it go.
        offload_activations: Whether what is saved for the backward pass waits on the host.
        cuda: Whether the optimizer works on all parameters at once, as it does on CUDA by default.

    Returns:
        What keeps the optimizer's state alive.
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
    """The optimizer's step with its state in place, and gradients there."""
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
        except RuntimeError:  # it looks at values
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
    """``loss.backward()``, which would turn modes such as ``CudaSemantics`` off, also for what is recomputed."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _saved_on_host() -> Iterator[None]:
    """What is saved for the backward pass leaves the device and comes back as a new tensor."""

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
