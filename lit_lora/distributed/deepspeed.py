"""DeepSpeed's ZeRO: optimizer state, gradients and weights are sharded over the processes."""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed import default_pg_timeout
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lit_lora.argument_types import check_types
from lit_lora.distributed.check import check_elementwise
from lit_lora.distributed.collectives import full_tensor
from lit_lora.distributed.deepspeed_config import complete_config, read_config
from lit_lora.distributed.optimizer_states import by_name, parameter_names
from lit_lora.distributed.zero_states import check_dropped, gather_states, scatter_states
from lit_lora.errors import UserError
from lit_lora.parameters import trainable_parameters


class LitLoraDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed's ZeRO for adapters: ``Trainer(strategy="lit_lora_deepspeed_stage_3")``, or ``_1``, ``_2``, ``_3_offload``.

    Stage 1 shards the optimizer state over the processes, stage 2 also the gradients, stage 3 also the weights; frozen
    weights are sharded in their quantized form. Adapter and optimizer state stay float32, and the base keeps its dtype. It
    also runs on CPUs, for trials. With :class:`~lit_lora.callbacks.AdapterCheckpoint` a checkpoint is the file that a single
    process writes, with full tensors of the adapter and of its optimizer state; the base is never gathered. Any other
    strategy resumes from it.

    Args:
        stage: Stage of ZeRO: 1, 2 or 3; defaults to 2.
        offload_optimizer: Keep the optimizer state in host memory and step the optimizer there; off by default.
        offload_parameters: Keep the shards of the weights in host memory, with stage 3; off by default.
        config: Further keys of a DeepSpeed config, or a JSON file with them; they take precedence over the strategy's own.
        process_group_backend: Backend of ``torch.distributed``; defaults to NCCL on GPUs and gloo on CPUs.
        timeout: How long a process waits for the others; defaults to 30 minutes.

    Raises:
        UserError: If DeepSpeed is not installed, or a value is outside its range.
    """

    config: dict[str, Any]

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        config: dict[str, Any] | str | Path | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        check_types(LitLoraDeepSpeed, locals())
        if find_spec("deepspeed") is None:
            raise UserError(
                'this strategy is DeepSpeed\'s: pip install "lit_lora[deepspeed]", or use lit_lora_fsdp or ddp'
            )
        if stage not in (1, 2, 3):
            raise UserError(f"stage must be 1, 2 or 3, not {stage}")
        if offload_parameters and stage != 3:
            raise UserError(f"offload_parameters=True needs stage=3, which shards the weights; stage is {stage}")
        # DeepSpeedStrategy's own __init__ would import DeepSpeed before the device is known.
        DDPStrategy.__init__(self, process_group_backend=process_group_backend, timeout=timeout)
        self.config = complete_config(stage, offload_optimizer, offload_parameters, read_config(config))
        self._parameter_names: list[list[str]] = []

    @property
    def shards_weights(self) -> bool:
        """Whether the loader calls :meth:`shard` for each block once its weights are loaded."""
        return self.zero_stage_3

    @property
    def precision_plugin(self) -> Precision:
        return self._precision_plugin or _AsTheModuleHasIt("32-true")

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        # It stays None: Lightning would prefer a plugin of the strategy to trainer.precision.
        self._precision_plugin: Precision | None = None
        if precision_plugin is not None and precision_plugin.precision != "32-true":
            raise UserError(
                f"trainer.precision={str(precision_plugin.precision)!r} would have DeepSpeed cast the adapter too; leave it at "
                f"32-true and set model.base_dtype to 'bfloat16'"
            )

    @property
    def skipped_step(self) -> bool:
        """Whether the last optimizer step was left out, in all processes, because gradients were not finite."""
        return bool(self.optimizers and getattr(self.optimizers[0], "overflow", False))

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning counts, since DeepSpeed would count on past the end of an epoch, where Lightning steps."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: the weights are restored before setup, as in a single process; DeepSpeed then copies them."""
        return False

    def setup_environment(self) -> None:
        device = self.root_device.type
        if device == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            # Collective calls in shared memory would be compiled first, and training makes none.
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        elif device != "cuda":
            raise UserError(f"DeepSpeed runs on CUDA, and on CPUs for trials, not on {device}; use strategy ddp")
        from deepspeed.utils import logger

        logger.setLevel(logging.WARNING)
        # DeepSpeed calls functions that newer versions of torch have renamed.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if self.root_device.type != "cpu":
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert isinstance(self.model, LightningModule)
        self.accelerator.setup(trainer)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self._setup_training(trainer, self.model)
        elif self.zero_stage_3:
            self.model, _ = self._initialize(self.model, None, self.config)
        self.barrier()

    def shard(self, module: nn.Module) -> None:
        """Shard the parameters of a module that are not sharded yet, with the first process's values."""
        import deepspeed

        deepspeed.zero.Init(module=module, config_dict_or_path=copy.deepcopy(self.config))

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        yield  # shard() shards the weights

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        yield  # the engine is told before each backward pass whether a step follows

    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = self._module.state_dict(keep_vars=True)
        return {name: full_tensor(value).detach().to("cpu", copy=True) for name, value in state.items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module, state = self._module, checkpoint["state_dict"]
        loaded = [parameter for name, parameter in module.named_parameters() if name in state]
        with _writable(loaded):
            module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer state that a single process would have, with full tensors; a collective call."""
        zero: Any = self.optimizers[0]
        states = gather_states(zero)
        groups, first = [], 0
        for group, names in zip(zero.optimizer.param_groups, self._parameter_names, strict=True):
            numbers = list(range(first, first + len(names)))
            groups.append({**_options(group), "params": numbers, "param_names": names})
            first += len(names)
        numbered = {i: states[parameter] for i, parameter in enumerate(self._parameters()) if parameter in states}
        return {"state": numbered, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        zero: Any = self.optimizers[0]
        saved = by_name(checkpoint["optimizer_states"][0], self._parameter_names)
        for group, saved_group in zip(zero.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update(_options(saved_group))
        scatter_states(zero, {parameter: saved["state"].get(i, {}) for i, parameter in enumerate(self._parameters())})

    @contextmanager
    def resizing(self) -> Iterator[list[Optimizer]]:
        """A context in which the trained parameters may change their shape; every process enters it.

        Yields:
            The optimizer as a single process has it: over the module's parameters, with full states, which may change too.
        """
        engine: Any = self.model
        zero: Any = self.optimizers[0]
        optimizer: Optimizer = zero.optimizer
        states = gather_states(zero)
        zero.destroy()
        parameters = iter(self._parameters())
        for group, names in zip(optimizer.param_groups, self._parameter_names, strict=True):
            group["params"] = [next(parameters) for _ in names]
        optimizer.state.clear()
        optimizer.state.update(states)
        yield [optimizer]
        check_dropped(optimizer, states)
        states = dict(optimizer.state)
        optimizer.state.clear()
        # As the engine's __init__ does. A new engine would keep the old one alive, by its hooks in the module.
        engine._configure_optimizer(optimizer, [])
        engine.optimizer.register_grad_acc_post_hook(engine._backward_post_hook)
        self._leave_out_overflows(engine.optimizer)
        self.optimizers = [engine.optimizer]
        scatter_states(engine.optimizer, states)
        del zero
        gc.collect()  # stage 3's old optimizer and its flat tensors refer to each other

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def teardown(self) -> None:
        if isinstance(self.model, LightningModule) or self.model is None:
            super().teardown()
            return
        # Strategy's own teardown would move all to the CPU, but a checkpoint may still be saved, which needs the device.
        engine: Any = self.model
        self.model = self.lightning_module
        engine.destroy()
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _setup_training(self, trainer: Trainer, module: LightningModule) -> None:
        clip = float(trainer.gradient_clip_val or 0)
        if clip and trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            raise UserError(
                f"gradient_clip_algorithm='value' with gradient_clip_val={clip}: DeepSpeed does not support clipping by value; "
                f"set gradient_clip_algorithm to 'norm'"
            )
        optimizer, scheduler = self._init_optimizers()
        check_elementwise(optimizer)
        for number, group in enumerate(optimizer.param_groups):
            if not group["params"]:
                raise UserError(
                    f"parameter group {number} of {type(optimizer).__name__} has nothing to train, and DeepSpeed leaves such "
                    f"groups out, so that a schedule would count others: make groups only of parameters that require gradients, "
                    f"or use strategy ddp or lit_lora_fsdp"
                )
        self._parameter_names = parameter_names(optimizer, module)
        self.model, zero_optimizer = self._initialize(module, optimizer, {**self.config, "gradient_clipping": clip})
        self.optimizers = [zero_optimizer]
        self.lr_scheduler_configs = [] if scheduler is None else [scheduler]

    def _initialize(
        self, module: LightningModule, optimizer: Optimizer | None, config: dict[str, Any]
    ) -> tuple[Any, Any]:
        """DeepSpeed's engine and optimizer."""
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        for part in module.modules():
            # Text encoders read weights of layers that they do not call, so all their weights are gathered at once.
            if isinstance(part, PreTrainedModel) and not trainable_parameters(part):
                set_z3_leaf_module(part, True)
        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index or 0),
            model=module,
            optimizer=optimizer,
            model_parameters=[] if optimizer is None else trainable_parameters(module),
            config=copy.deepcopy(config),
            dist_init_required=False,
        )
        if self.zero_stage_3:
            for layer in module.modules():
                # Adapters do the same: DoRA reads the base's weight, others read lists of parameters.
                if isinstance(layer, BaseTunerLayer):
                    for parameter in layer.parameters():
                        deepspeed.zero.register_external_parameter(layer, parameter)
        elif optimizer is not None:
            self._leave_out_overflows(zero_optimizer)
        return engine, zero_optimizer

    def _leave_out_overflows(self, zero: Any) -> None:
        """Leave out steps whose gradients are not finite, as stage 3 does by itself."""
        if not self.zero_stage_3:
            zero.check_grad_overflow = True

    def _parameters(self) -> list[Tensor]:
        """The optimizer's parameters, in its order."""
        named = dict(self._module.named_parameters())
        return [named[name] for names in self._parameter_names for name in names]


class _AsTheModuleHasIt(DeepSpeedPrecision):
    """A precision plugin that casts nothing: the module's own autocast chooses the precision of each operation."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(  # type: ignore[override]  # as in DeepSpeedPrecision
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        engine: Any = model.trainer.model
        engine.set_gradient_accumulation_boundary(not model.trainer.fit_loop._should_accumulate())
        super().backward(tensor, model, optimizer, *args, **kwargs)


@contextmanager
def _writable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gather sharded parameters inside the block; afterwards all processes have the first process's values."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}
