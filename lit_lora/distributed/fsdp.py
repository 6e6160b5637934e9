"""FSDP2: weights, gradients and optimizer state are sharded over the processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed import default_pg_timeout, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_lora.argument_types import check_types
from lit_lora.distributed.check import check_elementwise
from lit_lora.distributed.collectives import full_tensor, shard_like
from lit_lora.distributed.optimizer_states import map_states
from lit_lora.errors import UserError, check_whole


class LitLoraFSDP(ModelParallelStrategy):
    """FSDP2 (``torch.distributed.fsdp.fully_shard``) for adapters: ``Trainer(strategy="lit_lora_fsdp")``.

    Each process keeps a shard of the denoiser, frozen weights in their quantized form, and gathers a block's other shards
    while it computes with that block. With :class:`~lit_lora.callbacks.AdapterCheckpoint` a checkpoint is the file that a
    single process writes, with full tensors of the adapter and of its optimizer state; the base is never gathered. Any other
    strategy resumes from it.

    Args:
        shard_size: Number of processes that share one copy of the weights; gradients are averaged over the copies. ``node``
            means the processes of one machine, so that no weights are sent over the network. Defaults to all processes.
        cpu_offload: Keep shards of weights, gradients and optimizer state in host memory and step the optimizer there; off by
            default.
        process_group_backend: Backend of ``torch.distributed``; defaults to NCCL on GPUs and gloo on CPUs.
        timeout: How long a process waits for the others in a collective call before it fails, in YAML such as ``0:10:00``;
            defaults to 30 minutes.

    Raises:
        UserError: If ``shard_size`` is below 1 or, once the run starts, does not divide the number of processes.
    """

    shards_weights = True
    """The loader calls :meth:`shard` for each block once its weights are loaded."""

    def __init__(
        self,
        shard_size: int | Literal["node"] | None = None,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        check_types(LitLoraFSDP, locals())
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if isinstance(shard_size, str) and shard_size != "node":
            raise UserError(f"shard_size={shard_size!r} is neither a number of processes nor node")
        if not isinstance(shard_size, str):
            check_whole(1, shard_size=shard_size)
        self.shard_size = shard_size
        self.cpu_offload = cpu_offload
        self._shard_mesh: DeviceMesh | None = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self._shard_mesh = self._make_mesh()
        assert self._timeout is not None
        for mesh in (self.device_mesh, self._shard_mesh):
            for group in mesh.get_all_groups():
                _set_timeout(self._timeout, group)

    def setup(self, trainer: Trainer) -> None:
        if str(trainer.precision) != "32-true":
            raise UserError(
                f"trainer.precision={str(trainer.precision)!r} cannot be combined with lit_lora_fsdp; leave it at 32-true "
                f"and set model.base_dtype to 'bfloat16'"
            )
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            check_elementwise(optimizer, tensors=True)

    def shard(self, module: nn.Module) -> None:
        """Shard the weights of a module that are not sharded yet; every process must have the same values."""
        assert self._shard_mesh is not None, "setup_environment comes first"
        offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if self.cpu_offload else OffloadPolicy()
        before = type(module)
        with _integer_parameters():
            fully_shard(module, mesh=self._shard_mesh, reshard_after_forward=True, offload_policy=offload)
        # transformers looks up by the class's full name which hidden states a model can return.
        type(module).__module__, type(module).__qualname__ = before.__module__, before.__qualname__

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for module in self.model.modules():  # shards stay in host memory
            for name, parameter in module._parameters.items():
                if parameter is not None and not isinstance(parameter, DTensor):
                    module._parameters[name] = nn.Parameter(parameter.to(self.root_device), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state: dict[str, Any] = {}
        for name, value in self.lightning_module.state_dict().items():
            complete = full_tensor(value)  # a collective call; the first process writes
            if self.is_global_zero:
                state[name] = _on_cpu(complete)
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        here = self.lightning_module.state_dict()
        state = {
            name: shard_like(value, here[name]) if name in here else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state: dict[str, Any] = map_states(optimizer.state_dict(), lambda value: _on_cpu(full_tensor(value)))
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
            for parameter, values in optimizer.state.items():
                for name, value in values.items():
                    if isinstance(value, Tensor):
                        values[name] = shard_like(value, parameter)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # Shards in host memory are sent from there.
        return "cpu:gloo,cuda:nccl" if backend == "nccl" and self.cpu_offload else backend

    def _make_mesh(self) -> DeviceMesh:
        world, size = self.world_size, self.shard_size
        size = self.num_processes if size == "node" else size
        if size is None or size == world:
            return self.device_mesh["data_parallel"]
        if world % size:
            raise UserError(
                f"shard_size={size} does not divide the {world} processes of the run; choose one of "
                f"{', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
            )
        return init_device_mesh(self.root_device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


# torch 2.14 has made it public.
_set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout


@contextmanager
def _integer_parameters() -> Iterator[None]:
    """Let integer parameters be sharded: torch before 2.14 makes each shard require a gradient, which integers cannot."""
    new: Any = nn.Parameter.__new__

    def new_parameter(cls: type, data: Any = None, requires_grad: bool = True) -> Any:
        return new(cls, data, requires_grad and (data is None or data.is_floating_point()))

    nn.Parameter.__new__ = new_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Parameter.__new__ = new  # type: ignore[method-assign]


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
