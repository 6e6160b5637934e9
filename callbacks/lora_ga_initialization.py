"""Initializes LoRA by the gradients of the base's weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraGAConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_lora.adapters.ranked_layer import RankedLayer
from lit_lora.argument_types import check_types
from lit_lora.callbacks.layer_rows import input_rows, output_rows
from lit_lora.callbacks.rebased_initialization import (
    LayerSum,
    RebasedInitialization,
    linear_of,
    values_from_peft,
)
from lit_lora.errors import UserError, check_whole


class LoraGaInitialization(RebasedInitialization):
    """Initializes LoRA so that its first steps are like those of full fine-tuning.

    LoRA-GA (Wang et al., 2024): the gradient of each layer's weight, ``dL/dW``, is averaged over some batches and decomposed,
    ``U S V^T``. ``A`` and ``B`` become ``r`` of the right and ``r`` of the left singular vectors, scaled, and the base keeps
    ``W - scaling * B0 A0``, so that training begins with the base's outputs. Gradients of convolutions are those of their
    weights as matrices. PEFT computes the values from the gradients.

    It works with LoRA and rsLoRA in any LightningModule, on one device and with ``ddp``. Each layer's gradient takes four bytes
    for each weight in host memory until it is initialized; on the device there is one at a time. Until then gradient
    checkpointing keeps the inputs of the LoRA layers.

    Args:
        steps: Number of optimizer steps whose gradients are averaged, and in which the LoRA layers do not learn; defaults to
            4.
        direction: Which of the largest ``2 r`` singular vectors become rows of ``A`` and columns of ``B``: ``ArB2r`` the first
            ``r`` and the last ``r``, ``A2rBr`` the other way around, ``ArBr`` every second. Defaults to ``ArB2r``.
        scale: Scale of the first values: ``stable`` (``out^(1/4) / sqrt(stable_gamma)``), ``weight_svd`` (the weight's largest
            singular value), ``gd_scale`` (the inverse of LoRA's scaling) or ``unit``. Defaults to ``stable``.
        stable_gamma: Divisor for ``stable``; defaults to 16.

    Raises:
        UserError: If ``steps`` or ``stable_gamma`` is below 1; when training starts, if twice the rank exceeds a layer's
            dimensions, the adapter is not LoRA, is DoRA or has values already, training ends within the steps, the base is
            quantized, or the strategy, another callback, ``compile_blocks``, ``offload_blocks`` or ``optimizer_in_backward``
            exclude it.
    """

    def __init__(
        self,
        steps: int = 4,
        direction: Literal["ArBr", "A2rBr", "ArB2r"] = "ArB2r",
        scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable",
        stable_gamma: int = 16,
    ) -> None:
        check_types(LoraGaInitialization, locals())
        super().__init__(steps)
        check_whole(1, stable_gamma=stable_gamma)
        self.config = LoraGAConfig(direction=direction, scale=scale, stable_gamma=stable_gamma)
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    def check_layer(self, layer: RankedLayer) -> None:
        out, inputs = layer.b.shape[0], layer.a[0].numel()
        if 2 * layer.rank > min(out, inputs):
            raise UserError(
                f"LoraGaInitialization needs twice the rank of singular vectors, and {layer.name} with rank {layer.rank} has "
                f"{min(out, inputs)} ({inputs} inputs, {out} outputs); lower r, or leave the layer out of target_modules"
            )

    def watch_layer(self, layer: RankedLayer, total: LayerSum) -> RemovableHandle:
        module: Any = layer.layer
        base: nn.Module = module.get_base_layer()

        def follow(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            # Gradient checkpointing may call the layer without gradients, and again in the backward pass.
            if not module.training or not arguments or not output.requires_grad:
                return
            x = arguments[0].detach()

            @torch.no_grad()
            def take(gradient: Tensor) -> None:
                with torch.autocast(gradient.device.type, enabled=False):
                    rows = input_rows(base, x.float())
                    total.add(output_rows(base, gradient.float()).T @ rows / self._loss_scale(), len(rows))

            output.register_hook(take)

        handle: RemovableHandle = module.register_forward_hook(follow)
        return handle

    def first_values(self, layer: RankedLayer, total: LayerSum) -> tuple[Tensor, Tensor]:
        matrix = linear_of(layer)
        matrix._peft_loraga_grad = total.total.to(matrix.weight.device) / self.steps
        return values_from_peft(layer, matrix, init_lora_weights="lora_ga", lora_ga_config=self.config)

    def _loss_scale(self) -> float:
        """Factor by which float16 training multiplies the loss."""
        scaler = None if self._trainer is None else getattr(self._trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())
