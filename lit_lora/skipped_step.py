"""Optimizer steps that change nothing, as those that ``torch.amp.GradScaler`` skips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lit_lora.finite import fill_where


def skip_step_where(bad: Tensor, optimizer: Optimizer, scaled: bool = False) -> None:
    """Make the optimizer's next step change nothing if ``bad`` is true, without waiting for a GPU.

    Weights, optimizer state and what the optimizer counts in its parameter groups stay as they are, bit for bit,

    - with gradients on the CPU, where the decision is there: they become None, which optimizers pass over;
    - with ``fused=True`` of Adam, AdamW, SGD and Adagrad, whose kernels read the decision from ``found_inf``;
    - with a ``GradScaler``, which decides itself.

    Other optimizers get gradients of zero: the weights move by momentum and weight decay alone, and the state stays finite.

    Args:
        bad: Decision, a bool scalar on the device of the run.
        optimizer: Optimizer of the step.
        scaled: Whether a ``GradScaler`` calls the optimizer; off by default.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    if scaled and fused:
        fill_where(bad, gradients, float("nan"))  # it looks at the gradients once more in its step
    elif scaled or _is_read(gradients) or _needs_first_step(optimizer):
        if bad:
            _skip(optimizer)
    else:
        fill_where(bad, gradients, 0.0)
        if fused:
            _skip_where(bad, optimizer)


def _is_read(gradients: list[Tensor]) -> bool:
    """Whether the host knows the gradients without waiting."""
    return all(gradient.device.type == "cpu" for gradient in gradients)


def _needs_first_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer's first step must be a good one: fused SGD leaves its momentum uninitialized otherwise."""
    return (
        isinstance(optimizer, SGD)
        and any(group["momentum"] for group in optimizer.param_groups)
        and not any("momentum_buffer" in state for state in optimizer.state.values())
    )


def _skip(optimizer: Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [dict(group) for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = None

    def restore(*_: Any) -> None:
        hook.remove()
        if any(parameter.grad is not None for parameter in parameters):
            return  # GradScaler did not call the optimizer: this is a later step
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.clear()
            group.update(values)

    # Schedule-free optimizers and Prodigy count steps in their groups, with or without gradients.
    hook = optimizer.register_step_post_hook(restore)


def _skip_where(bad: Tensor, optimizer: Any) -> None:
    def forget(*_: Any) -> None:
        hook.remove()
        del optimizer.found_inf

    optimizer.found_inf = bad.to(torch.float32)
    hook = optimizer.register_step_post_hook(forget)
