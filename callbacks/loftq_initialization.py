"""Initializes LoRA by what quantization has changed in the base's weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_lora.adapters.in_place import peft_models
from lit_lora.adapters.methods.lora import leave_out
from lit_lora.adapters.ranked_layer import RankedLayer
from lit_lora.argument_types import check_types
from lit_lora.callbacks.changed_ranks import ChangedRanks
from lit_lora.callbacks.eva_initialization import EvaInitialization
from lit_lora.callbacks.first_values import check_no_start, check_untrained
from lit_lora.distributed.collectives import broadcast, shard_like
from lit_lora.errors import UserError
from lit_lora.formats.quantized_base import quantized_metadata
from lit_lora.quantization import Quantization
from lit_lora.quantization.frozen_layer import FrozenLayer
from lit_lora.random_state import fixed_randomness


class LoftqInitialization(ChangedRanks):
    """Initializes LoRA so that training begins close to the base as it was before it was quantized.

    LoftQ (Li et al., 2023) with one iteration, as ``peft.replace_lora_weights_loftq``: ``scaling * B A`` becomes the largest part
    of ``W - Q(W)`` that the rank can hold. The weights ``W`` are read from the base's files once more, one at a time. It works
    with LoRA and rsLoRA, with any quantization, and under ``ddp`` and ``lit_lora_fsdp``.

    Args:
        files_for: Base for which the adapter's files are written. ``quantized``: for the quantized base ``Q(W)``, with which
            they compute what was trained; metadata and model card name the quantization. ``original``: for the published
            base ``W``; the initial values are subtracted, which doubles the rank, and outputs differ from the training's by
            the part of ``W - Q(W)`` that the initial values do not hold. Defaults to ``quantized``.

    Raises:
        UserError: When training starts, if the adapter is not LoRA, is DoRA or has values already, the base is not quantized, the
            module is not :class:`LoraDiffusion`, or with DeepSpeed or :class:`EvaInitialization`.
    """

    def __init__(self, files_for: Literal["quantized", "original"] = "quantized") -> None:
        check_types(LoftqInitialization, locals())
        super().__init__()
        self.files_for: Literal["quantized", "original"] = files_for
        self._done = False
        self._quantization: Quantization | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._done = False
        self._quantization = getattr(pl_module, "quantization", None)

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._done:
            return
        if trainer.ckpt_path is not None:
            raise UserError(
                f"the checkpoint {trainer.ckpt_path} was saved without LoftqInitialization, which comes before the first step; "
                f"remove it from trainer.callbacks, or start without ckpt_path"
            )
        self.find_layers(pl_module)
        check_untrained(self.layers, type(self).__name__)
        if any(layer.config.use_dora for layer in self.layers):
            raise UserError(
                "LoftqInitialization replaces weights from which DoRA has computed its magnitudes; leave use_dora out"
            )
        quantized = [layer for layer in self.layers if _quantization_of(layer) is not None]
        if not quantized:
            raise UserError(
                "LoftqInitialization corrects quantized weights, and no LoRA layer has one; set model.quantization, such as NF4, "
                "or remove LoftqInitialization from trainer.callbacks"
            )
        values: dict[str, tuple[Tensor, Tensor]] = {}
        if trainer.is_global_zero:
            weights = pl_module.family.unquantized_weights()
            for layer in quantized:
                values[layer.path] = _first_values(layer, weights.unquantized(f"{layer.name}.weight"))
        values = broadcast(values)
        for layer in quantized:
            for parameter, value in zip((layer.a, layer.b), values[layer.path], strict=True):
                parameter.copy_(shard_like(value.to(parameter.device), parameter))
        if self.files_for == "original":
            for _, model in peft_models(pl_module):
                leave_out(model, {layer.name: values[layer.path] for layer in quantized})
        self._done = True
        self.changed(trainer, "on_adapter_replaced")
        rank_zero_info(f"LoftqInitialization gave {len(quantized)} of {len(self.layers)} layers their first values")

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done, "files_for": self.files_for, "quantization": repr(self._quantization)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["files_for"] != self.files_for:
            raise UserError(
                f"files_for={self.files_for!r} of LoftqInitialization is {state_dict['files_for']!r} in the checkpoint; resume "
                f"with that, or start without ckpt_path"
            )
        if (saved := state_dict["quantization"]) != (here := repr(self._quantization)):
            raise UserError(
                f"the first values of LoftQ correct the error of the quantization {saved} of the checkpoint, and this run has "
                f"{here}; resume with model.quantization {saved}, or start without ckpt_path"
            )
        self._done = bool(state_dict["done"])

    def training_facts(self) -> dict[str, str]:
        """What the adapter's files say about the base that they are made for."""
        return {} if self.files_for == "original" else quantized_metadata(self._quantization)

    def _check_run(self, trainer: Trainer, module: Any) -> None:
        check_no_start(module, type(self).__name__)
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError(
                "LoftqInitialization sets the adapter's values after DeepSpeed has copied them; use one device, or strategy ddp "
                "or lit_lora_fsdp"
            )
        if not hasattr(module, "family"):
            raise UserError(
                f"LoftqInitialization reads the weights of the base's files again, which {type(module).__name__} does not name; "
                f"use LoraDiffusion, or remove LoftqInitialization from trainer.callbacks"
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(one, EvaInitialization) for one in callbacks):
            raise UserError(
                "LoftqInitialization and EvaInitialization both set the first values; remove one of them from trainer.callbacks"
            )


def _quantization_of(layer: RankedLayer) -> Quantization | None:
    base: Any = layer.layer.get_base_layer()
    return base.quantization if isinstance(base, FrozenLayer) and not base.is_dense else None


def _first_values(layer: RankedLayer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` whose scaled product is the largest part of ``W - Q(W)``, float32 on the CPU.

    The randomized decomposition of Halko et al. (2011) suffices: singular values of ``W - Q(W)`` fall slowly, so that nearby
    vectors are as good.
    """
    quantization = _quantization_of(layer)
    assert quantization is not None
    # On the CPU, where the base was quantized too.
    restored = quantization.dequantize(quantization.quantize(weight), weight.shape, torch.float32)
    device = layer.a.device
    residual = (weight.float() - restored).flatten(1).to(device)
    rank, most = layer.rank, min(residual.shape)
    with fixed_randomness(device), torch.autocast(device.type, enabled=False):
        u, s, v = torch.svd_lowrank(residual, q=min(2 * rank, most), niter=4)
        a = (
            torch.randn(rank, residual.shape[1]) / residual.shape[1]
        )  # stays where the rank exceeds the layer's dimensions
    b = torch.zeros(len(residual), rank)
    root = (s[:rank] / layer.scaling).sqrt()
    a[: len(root)], b[:, : len(root)] = (v[:, :rank] * root).T.cpu(), (u[:, :rank] * root).cpu()
    return a.reshape(rank, *layer.a.shape[1:]), b.reshape(len(b), rank, *layer.b.shape[2:])
