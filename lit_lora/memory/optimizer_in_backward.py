"""Steps the optimizer during the backward pass, so that the gradients never exist all at once."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from peft import PeftConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_lora.adapters import method_of
from lit_lora.errors import UserError
from lit_lora.finite import any_non_finite_gradient
from lit_lora.skipped_step import skip_step_where
from lit_lora.to_device import to_device


class OptimizerInBackward:
    """Steps parameters as soon as their gradients are complete, and frees the gradients (LOMO, Lv et al., 2023).

    The optimizer and its state stay the same, so that checkpoints, schedules and 8-bit optimizers work as usual. The call of
    ``optimizer.step`` at the end of a training step remains; it applies the last few gradients.

    Args:
        optimizer: Optimizer that updates each parameter independently.
        clip_value: Absolute value to which each element of a gradient is clipped before the step; defaults to 0, no clipping.
            Nothing else may clip, because no gradients are left after the backward pass.
        bucket_bytes: Bytes of complete gradients that trigger a step; defaults to 1 MiB. With a step for each parameter the
            overhead would exceed the arithmetic.

    Raises:
        UserError: If the optimizer calls the training step itself, as LBFGS does.
    """

    def __init__(self, optimizer: Optimizer, clip_value: float = 0.0, bucket_bytes: int = 1 << 20) -> None:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(
                f"memory.optimizer_in_backward: {type(optimizer).__name__} computes the gradients itself, several times a step; "
                f"set memory.optimizer_in_backward to false, or use an optimizer such as torch.optim.AdamW"
            )
        self.optimizer = optimizer
        self.clip_value = clip_value
        self.bucket_bytes = bucket_bytes
        self.non_finite = torch.tensor(False)
        """Whether a gradient was NaN or Inf since :meth:`take_non_finite`; a bool scalar on the gradients' device."""
        self._checked = False
        self._complete: dict[int, list[Tensor]] = {}
        """Parameters with complete gradients, by the number of their parameter group."""
        self._bytes = 0
        self._hooks: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._take, number))
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        ]
        self._hooks.append(optimizer.register_step_post_hook(self._free))

    def remove(self) -> None:
        """Remove all hooks, so that only ``optimizer.step`` steps."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def take_non_finite(self) -> Tensor:
        """Return :attr:`non_finite` and reset it."""
        found, self.non_finite = self.non_finite, torch.tensor(False)
        return found

    def _take(self, group_number: int, parameter: Tensor) -> None:
        """Collect a parameter whose gradient is complete."""
        assert parameter.grad is not None
        if self.clip_value:
            parameter.grad.clamp_(-self.clip_value, self.clip_value)
        self._complete.setdefault(group_number, []).append(parameter)
        self._bytes += parameter.grad.nbytes
        if self._bytes >= self.bucket_bytes:
            self._step()

    def _step(self) -> None:
        """Step the parameters whose gradients are complete; the step is skipped if one of them is not finite."""
        complete = [parameter for parameters in self._complete.values() for parameter in parameters]
        bad = any_non_finite_gradient([parameter.grad for parameter in complete if parameter.grad is not None])
        self.non_finite = to_device(self.non_finite, bad.device) | bad
        groups = self.optimizer.param_groups  # looked up each time, because loading a checkpoint replaces them
        chosen = {number: groups[number] for number in self._complete}
        members = {number: group["params"] for number, group in chosen.items()}
        before = None if self._checked else [_settings(group) for group in chosen.values()]
        try:
            # With all its parameters the optimizer would look for gradients of all of them in each step.
            self.optimizer.param_groups = list(chosen.values())
            for number, group in chosen.items():
                group["params"] = self._complete[number]
            skip_step_where(bad, self.optimizer)
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
            for number, group in chosen.items():
                group["params"] = members[number]
        if before is not None:
            self._check(before, [_settings(group) for group in chosen.values()])
            self._checked = not bool(bad)  # a step that is skipped shows nothing

    def _free(self, *_: Any) -> None:
        """Free the gradients after a step, also after the step that Lightning calls."""
        for parameters in self._complete.values():
            for parameter in parameters:
                parameter.grad = None
        self._complete, self._bytes = {}, 0

    def _check(self, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
        """Refuse, at the first step, an optimizer that keeps state shared by all parameters."""
        changed = {
            name
            for old, new in zip(before, after, strict=True)
            for name in new
            if name not in old or old[name] != new[name]
        }
        if changed:
            raise UserError(
                f"memory.optimizer_in_backward: {type(self.optimizer).__name__} keeps {', '.join(sorted(changed))} for all "
                f"parameters together, so it cannot step them one by one; set memory.optimizer_in_backward to false, or use "
                f"an optimizer such as torch.optim.AdamW"
            )


def check_optimizer_in_backward(trainer: Trainer, adapter: PeftConfig | None = None) -> None:
    """Check that nothing in the run needs all gradients at once.

    Args:
        trainer: Trainer of the run.
        adapter: Config of the trained adapter; defaults to none.

    Raises:
        UserError: If something in the run needs all gradients at once.
    """
    problem = _problem(trainer, adapter)
    if problem:
        raise UserError(
            f"memory.optimizer_in_backward steps each parameter as soon as it has a gradient, but {problem}"
        )


def _problem(trainer: Trainer, adapter: PeftConfig | None) -> str | None:
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
        return (
            f"gradient_clip_val={trainer.gradient_clip_val} clips by the norm of all gradients; set gradient_clip_algorithm to "
            f"'value', or gradient_clip_val to null"
        )
    accumulated = max(
        [
            trainer.accumulate_grad_batches,
            *(
                most
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, GradientAccumulationScheduler)
                for most in callback.scheduling.values()
            ),
        ]
    )
    if accumulated > 1:
        return f"gradients accumulate over {accumulated} batches; set accumulate_grad_batches to 1 and raise the batch size"
    if str(trainer.precision) == "16-mixed":
        return (
            "precision 16-mixed checks all gradients before a step; leave trainer.precision at 32-true and set model.base_dtype "
            "to 'bfloat16'"
        )
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes average their gradients after the backward pass; set devices to 1"
    if method_of(adapter).whole_gradients:
        return f"{type(adapter).__name__} reads all gradients after each step; use peft.LoraConfig"
    return None


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in group.items() if name != "params"}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
