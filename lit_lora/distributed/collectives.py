"""Collective calls: gathering, broadcasting, and full tensors from shards and back."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Gather the values of all processes, in rank order; a collective call if there are several processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all are filled


def broadcast(value: T) -> T:
    """Send the first process's value to all processes; a collective call if there are several processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def time_limit(strategy: Any) -> timedelta | None:
    """How long the processes of a run wait for each other, the strategy's ``timeout``; None for torch's default.

    Groups of processes that torch makes besides the strategy's own do not take it over, so each is given it.
    """
    limit: timedelta | None = getattr(strategy, "_timeout", None)
    return limit


def full_tensor(value: Any) -> Any:
    """The full tensor of a sharded one, by a collective call; other values are returned unchanged.

    Args:
        value: Any value. Under DeepSpeed's ZeRO-3 pass the parameter itself: only it records that it is sharded.
    """
    if isinstance(value, DTensor):
        return value.full_tensor()
    if hasattr(value, "ds_id"):
        if value.ds_status.name == "AVAILABLE":  # to all processes; modules may hold it until the optimizer step
            return value.detach().clone()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([value]):
            return value.detach().clone()
    return value


def full_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter in all processes together."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # under DeepSpeed's ZeRO-3
    return shape


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient before an optimizer step, averaged over the processes; None if there is none.

    It is a full tensor, except that FSDP2 shards it as the parameter. Under DeepSpeed's ZeRO this is a collective call.
    """
    if parameter.grad is None and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_grad

        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient
    return parameter.grad


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard of a full tensor for this process, sharded as ``like`` is; the full tensor if ``like`` is not sharded.

    Args:
        value: Full tensor, equal in all processes.
        like: Tensor that gives mesh and placements; a tensor of another shape leaves the value unchanged.
    """
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # Without a source rank nothing is sent: each process slices its own shard.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def sum_of_shards(values: Tensor, like: Tensor) -> Tensor:
    """The sum of what each process has computed from its shard; the values themselves if ``like`` is not sharded.

    Args:
        values: Values of this process, of the same shape in all.
        like: Tensor whose shards the values were computed from.
    """
    if not isinstance(like, DTensor):
        return values
    placements = [Partial() if isinstance(one, Shard) else Replicate() for one in like.placements]
    return DTensor.from_local(values, like.device_mesh, placements).full_tensor()
