"""What callbacks have in common that take the first values of LoRA out of the base's weights, as the data tell."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_lora.adapters import ADAPTER_NAME
from lit_lora.adapters.in_place import peft_models
from lit_lora.adapters.methods.lora import rebase
from lit_lora.adapters.ranked_layer import RankedLayer
from lit_lora.callbacks.changed_ranks import ChangedRanks, refuse_saved_values
from lit_lora.callbacks.first_steps import FirstSteps
from lit_lora.distributed import is_ours
from lit_lora.distributed.collectives import broadcast
from lit_lora.errors import UserError
from lit_lora.quantization.frozen_layer import quantized_layers
from lit_lora.random_state import fixed_randomness


class RebasedInitialization(FirstSteps):
    """Sums up a matrix of each LoRA layer over the first optimizer steps, and makes the layer's first values from it.

    The base keeps ``W - scaling * B0 A0``, so that training begins with the base's outputs; the files are LoRA of twice the rank
    for the original base: see :class:`~lit_lora.adapters.methods.lora.LoraMethod`. The LoRA layers do not learn in the steps
    that are looked at. No data is read twice, with any datamodule, and resuming is exact, also before the layers are
    initialized. The sums are kept in host memory. With several processes they are those of the first one.

    Subclasses say what is summed up (:meth:`watch_layer`) and what is made of it (:meth:`first_values`).

    Args:
        steps: Number of optimizer steps that are looked at.

    Raises:
        UserError: If ``steps`` is below 1; when training starts, if the adapter is not LoRA or is DoRA, the base is quantized, or
            the strategy, another callback, ``compile_blocks``, ``offload_blocks`` or ``optimizer_in_backward`` exclude it.
    """

    @abstractmethod
    def watch_layer(self, layer: RankedLayer, total: LayerSum) -> RemovableHandle:
        """Register a hook that adds to a layer's sum in each training step.

        Args:
            layer: The layer.
            total: Its sum.
        """

    @abstractmethod
    def first_values(self, layer: RankedLayer, total: LayerSum) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` as matrices, ``(r, in)`` and ``(out, r)``.

        Args:
            layer: The layer.
            total: Its finite sum, not zero.
        """

    def check_layer(self, layer: RankedLayer) -> None:
        """Refuse a layer that cannot be initialized; does nothing by default."""

    def check_start(self, trainer: Trainer) -> None:
        if trainer.global_step and self.restored is None:
            raise UserError(
                f"the checkpoint of step {trainer.global_step} was saved without {type(self).__name__}, which begins with the "
                f"first step; remove it from trainer.callbacks, or start without ckpt_path"
            )

    def watch(self, pl_module: LightningModule) -> None:
        self._check_model(pl_module)
        for layer in self.layers:
            self.check_layer(layer)
            total = LayerSum((self.restored or {}).get(layer.path))
            self.seen[layer.path] = total
            self.hooks.append(self.watch_layer(layer, total))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the layers stay as they are, so that the sums are those of the base alone."""
        if not self.done:
            for layer in self.layers:
                for parameter in (layer.a, layer.b):
                    if parameter.grad is not None:
                        parameter.grad.zero_()

    @torch.no_grad()
    def initialize(self, trainer: Trainer, pl_module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        known = [layer for layer in self.layers if self.seen[layer.path].is_usable]
        found = broadcast({layer.path: self._values(layer) for layer in known} if trainer.is_global_zero else {})
        for _, model in peft_models(pl_module):
            own = [layer for layer in self.layers if layer.config is model.peft_config[ADAPTER_NAME]]
            rebase(model, {layer.name: found[layer.path] for layer in own if layer.path in found})
        for layer in self.layers:
            if layer.path not in found:
                continue
            for parameter, value in zip((layer.a, layer.b), found[layer.path], strict=True):
                parameter.copy_(value)
                for optimizer in optimizers:
                    optimizer.state.pop(parameter, None)
        rank_zero_info(f"{type(self).__name__} gave {len(found)} of {len(self.layers)} layers their first values")

    def _values(self, layer: RankedLayer) -> tuple[Tensor, Tensor]:
        """First values in the shapes of the layer's, float32 on the CPU."""
        device = layer.a.device
        with torch.autocast(device.type, enabled=False), fixed_randomness(device):
            a, b = self.first_values(layer, self.seen[layer.path])
        return a.cpu().reshape(layer.a.shape).contiguous(), b.cpu().reshape(layer.b.shape).contiguous()

    def _check_run(self, trainer: Trainer, module: Any) -> None:
        name = type(self).__name__
        refuse_saved_values(module, name)
        if is_ours(trainer.strategy):
            raise UserError(
                f"{name} takes the adapter's first values out of the base's weights, which {type(trainer.strategy).__name__} "
                f"shards; use one device or strategy ddp, or remove {name} from trainer.callbacks"
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others = [one for one in callbacks if isinstance(one, ChangedRanks) and one is not self]
        if others:
            raise UserError(
                f"{name} and {type(others[0]).__name__} cannot be combined: a part of the base is in the adapter's first "
                f"values, which must keep their ranks; remove one of them from trainer.callbacks"
            )
        memory = getattr(module, "memory", None)
        for option, value in (
            ("compile_blocks", getattr(module, "compile_blocks", False)),
            ("memory.offload_blocks", getattr(memory, "offload_blocks", False)),
            ("memory.optimizer_in_backward", getattr(memory, "optimizer_in_backward", False)),
        ):
            if value:
                raise UserError(
                    f"{name} reads inputs and gradients of single layers and changes their weights, which {option} does not "
                    f"allow; set {option} to false, or remove {name} from trainer.callbacks"
                )

    def _check_model(self, module: nn.Module) -> None:
        name = type(self).__name__
        if quantized := quantized_layers(module):
            raise UserError(
                f"{name} moves a part of the base's weights into the adapter, and {len(quantized)} layers are stored as "
                f"{type(quantized[0].quantization).__name__}; leave model.quantization out, or remove {name} from "
                f"trainer.callbacks"
            )
        if any(layer.config.use_dora for layer in self.layers):
            raise UserError(
                f"{name} changes the weights from which DoRA has computed its magnitudes; leave use_dora out"
            )


class LayerSum:
    """A sum of matrices of one layer, float32 in host memory.

    Args:
        state: Result of :meth:`state`; defaults to none.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self._total: Tensor | None = None if state is None else state["total"]
        self.rows: int = 0 if state is None else state["rows"]
        """Number of rows of the layer's inputs that were looked at."""

    def add(self, matrix: Tensor, rows: int) -> None:
        """Add a matrix; one that holds NaN or Inf is left out.

        Args:
            matrix: Matrix of float32.
            rows: Number of rows of inputs that it comes from.
        """
        if not matrix.isfinite().all():
            return
        self._total = matrix.cpu() if self._total is None else self._total.add_(matrix.cpu())
        self.rows += rows

    @property
    def is_usable(self) -> bool:
        """Whether anything but zeros was added."""
        return self._total is not None and bool(self._total.any())

    @property
    def total(self) -> Tensor:
        """The sum."""
        assert self._total is not None, "see is_usable"
        return self._total

    def state(self) -> dict[str, Any]:
        """State that a checkpoint can hold."""
        return {"total": self._total, "rows": self.rows}


def linear_of(layer: RankedLayer) -> Any:
    """A Linear layer with the base's weight in float32; that of a convolution is ``(out, C * height * width)``.

    PEFT's initializations read it, and further attributes that they expect of it, and change it.
    """
    weight: Tensor = layer.layer.get_base_layer().weight.detach()
    matrix = nn.Linear(layer.a[0].numel(), len(layer.b), bias=False, device="meta")
    matrix.weight = nn.Parameter(weight.float().flatten(1), requires_grad=False)
    return matrix


def values_from_peft(layer: RankedLayer, matrix: nn.Linear, **options: Any) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` as PEFT initializes them for a Linear layer.

    Args:
        layer: Layer whose rank and scaling hold.
        matrix: Result of :func:`linear_of` with what PEFT's initialization expects of it.
        **options: Options of ``LoraConfig`` that choose the initialization.
    """
    alpha: Any = layer.layer.lora_alpha[ADAPTER_NAME]
    config = LoraConfig(
        r=layer.rank, lora_alpha=alpha, use_rslora=layer.config.use_rslora, target_modules=["0"], **options
    )
    adapted: Any = get_peft_model(nn.Sequential(matrix), config, adapter_name=ADAPTER_NAME)
    made = adapted.get_submodule("base_model.model.0")
    return made.lora_A[ADAPTER_NAME].weight.detach(), made.lora_B[ADAPTER_NAME].weight.detach()
