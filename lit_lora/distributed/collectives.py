"""What each process of a run has, and what they have together."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; a collective call where there are several."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all are filled


def broadcast(value: T) -> T:
    """The value of the first process, in all of them; a collective call where there are several."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def full_tensor(value: Any) -> Any:
    """A tensor of which each process has a part, in full; a collective call for such tensors, other values as they are.

    Args:
        value: Of DeepSpeed's stage 3 the parameter itself, which alone knows that it is sharded.
    """
    if isinstance(value, DTensor):
        return value.full_tensor()
    if hasattr(value, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([value]):
            return value.detach().clone()
    return value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """The process's own part of a tensor that it has in full, if ``like`` is a tensor of which each process has a part.

    Args:
        value: The same in all processes.
        like: Of the same shape, or the value stays as it is.
    """
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # Without a source rank nothing is sent: each process cuts out its own part.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to(like.device)
