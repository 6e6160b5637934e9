"""AdaLoRA's rank allocation, which PEFT leaves to the training loop to call and to save."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraModel, PeftModel

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def allocate_ranks(model: PeftModel, step: int) -> None:
    """Prune the least important ranks by AdaLoRA's schedule (Zhang et al. 2023); nothing for other methods.

    Args:
        model: The adapted model, gradients still in place.
        step: Number of the optimizer step just done, from 1.
    """
    if isinstance(model.base_model, AdaLoraModel):
        model.base_model.update_and_allocate(step)


def allocation_state(model: PeftModel) -> dict[str, Any]:
    """What the next allocation depends on, in plain types; empty for other methods."""
    if not isinstance(model.base_model, AdaLoraModel):
        return {}
    allocator = model.base_model.rankallocator
    averages = {name: dict(getattr(allocator, name)) for name in _AVERAGES}
    return averages | {"rank_pattern": allocator.peft_config.rank_pattern}


def restore_allocation(model: PeftModel, state: dict[str, Any]) -> None:
    """Continue from :func:`allocation_state`."""
    if not state or not isinstance(model.base_model, AdaLoraModel):
        return
    allocator = model.base_model.rankallocator
    devices = {name: parameter.device for name, parameter in model.base_model.model.named_parameters()}
    for name in _AVERAGES:
        setattr(allocator, name, {key: value.to(devices[key]) for key, value in state[name].items()})
    allocator.peft_config.rank_pattern = state["rank_pattern"]
