"""Optimizer states that DeepSpeed's ZeRO shards, as a single process has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lit_lora.distributed.collectives import full_shape
from lit_lora.errors import UserError


def gather_states(zero: Any) -> dict[Tensor, dict[str, Any]]:
    """The state of each parameter that has one, with full tensors on the CPU; a collective call.

    Args:
        zero: Optimizer of a DeepSpeed engine.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(zero)
    states: dict[Tensor, dict[str, Any]] = {}
    for flat, parameters in _flat_parameters(zero):
        values = zero.optimizer.state.get(flat, {})
        for parameter in parameters if values else []:
            states[parameter] = {
                name: safe_get_full_optimizer_state(parameter, name).to("cpu", copy=True)
                if _is_flat(value, flat)
                else _copied(value, torch.device("cpu"))
                for name, value in values.items()
            }
    return states


def scatter_states(zero: Any, states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Give each process its part of the states that :func:`gather_states` returns.

    Args:
        zero: Optimizer of a DeepSpeed engine.
        states: States by parameter, equal in all processes; parameters without a state may be left out.
    """
    # torch keeps the step count on the device for these, on the CPU otherwise.
    fused = any(group.get("fused") or group.get("capturable") for group in zero.optimizer.param_groups)
    for flat, parameters in _flat_parameters(zero):
        some = next((parameter for parameter in parameters if states.get(parameter)), None)
        if some is not None:
            zero.optimizer.state[flat] = {
                name: torch.zeros_like(flat)
                if isinstance(value, Tensor) and value.shape == full_shape(some)
                else _copied(value, flat.device if fused else torch.device("cpu"))
                for name, value in states[some].items()
            }
    _link(zero)
    for flat, parameters in _flat_parameters(zero):
        for parameter in parameters:
            for name, value in states.get(parameter, {}).items():
                if _is_flat(zero.optimizer.state[flat][name], flat):
                    _set_state(parameter, name, value)


def check_dropped(optimizer: Optimizer, before: Mapping[Tensor, Any]) -> None:
    """Check that states were dropped for all parameters of a group or for none: ZeRO counts steps for a group as a whole.

    Args:
        optimizer: Optimizer with states by parameter.
        before: The states that it had.

    Raises:
        UserError: If a parameter of a group has lost its state and another has not.
    """
    for number, group in enumerate(optimizer.param_groups):
        had = [parameter for parameter in group["params"] if parameter in before]
        kept = [parameter for parameter in had if parameter in optimizer.state]
        if kept and len(kept) < len(had):
            raise UserError(
                f"{len(had) - len(kept)} of {len(had)} parameters in group {number} of {type(optimizer).__name__} begin anew, "
                f"and DeepSpeed counts the steps of a group as a whole; put the others into a group of their own, with the "
                f"model's parameter_groups, or use strategy ddp or lit_lora_fsdp"
            )


def _flat_parameters(zero: Any) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Flat tensors that the optimizer steps in this process, each with the parameters it holds shards of."""
    if _shards_weights(zero):
        yield from zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    else:
        yield from zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)


def _shards_weights(zero: Any) -> bool:
    """Whether the optimizer is that of stage 3."""
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _link(zero: Any) -> None:
    """Make DeepSpeed map each parameter to its place in the flat tensors."""
    if not _shards_weights(zero):  # DeepSpeed does so in its first step only
        zero._link_all_hp_params()
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_state(parameter: Any, name: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.float().flatten()
    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value, name)
        return
    # DeepSpeed's own function for full values ignores that the last shard may be shorter.
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    padded = nn.functional.pad(value, (0, size * distributed.get_world_size(group) - value.numel()))
    safe_set_local_optimizer_state(parameter, padded.narrow(0, size * distributed.get_rank(group), size), name)


def _is_flat(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _copied(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
