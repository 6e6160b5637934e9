"""Parameters that change their shape during training, under strategies that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def resize_parameter(root: nn.Module, parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Give a parameter values of another shape; its gradient is dropped.

    Args:
        root: Module that contains the parameter.
        parameter: Parameter, which FSDP2 or DeepSpeed's ZeRO-3 may have sharded.
        values: Full tensor of new values, equal in all processes.

    Returns:
        The same object, or the one that takes its place where FSDP2 has sharded it.
    """
    parameter.grad = None
    if hasattr(parameter, "ds_id"):
        _resize_zero_parameter(parameter, values)
        return parameter
    if not isinstance(parameter, DTensor):
        parameter.data = values  # the same object, since optimizers and callbacks hold it
        return parameter
    # FSDP2 has no public way to change a shape: each of its parameters is set up anew with the new one.
    holder = next(one for one in _fsdp_parameters(root) if one.sharded_param is parameter)
    holder._post_load_hook_handle.remove()
    vars(holder).pop("_unsharded_param", None)
    offload = CPUOffloadPolicy(pin_memory=holder.pin_memory) if holder.offload_to_cpu else OffloadPolicy()
    name = holder._param_fqn
    holder.__init__(
        nn.Parameter(values.to(holder.device), parameter.requires_grad),
        holder._module_info,
        holder.mesh_info,
        holder.post_forward_mesh_info,
        holder.device,
        None,
        holder.mp_policy,
        offload,
    )
    holder._param_fqn = name
    holder.init_dtype_attrs(holder.mp_policy)
    sharded: nn.Parameter = holder.sharded_param
    return sharded


@contextmanager
def resizing(strategy: Any) -> Iterator[Sequence[Optimizer]]:
    """A context for :func:`resize_parameter` during training, after which the strategy knows the new shapes.

    Every process enters it.

    Args:
        strategy: Strategy of the trainer.

    Yields:
        The optimizers, whose states by parameter must be resized too.
    """
    if hasattr(strategy, "resizing"):  # LitLoraDeepSpeed
        with strategy.resizing() as optimizers:
            yield optimizers
        return
    yield strategy.optimizers
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module  # the old reducer removes its hooks when it is freed
        strategy.configure_ddp()


def _resize_zero_parameter(parameter: Any, values: Tensor) -> None:
    """Shard new values of another shape over the processes, where DeepSpeed's ZeRO-3 has sharded a parameter."""
    gathered = parameter.ds_status.name == "AVAILABLE"
    # As when DeepSpeed shards a parameter for the first time; its identity and its methods stay.
    parameter.ds_shape, parameter.ds_numel = values.shape, values.numel()
    parameter.ds_tensor = parameter.ds_secondary_tensor = None
    parameter.data = values
    parameter.ds_status = type(parameter.ds_status).AVAILABLE
    parameter.partition()
    if gathered:  # as while a checkpoint is loaded
        parameter.all_gather()


def _fsdp_parameters(root: nn.Module) -> list[Any]:
    from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state

    found: list[Any] = []
    for module in root.modules():
        state: Any = _get_module_fsdp_state(module)
        if state is not None:
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            found += [one for group in groups if group is not None for one in group.fsdp_params]
    return found
