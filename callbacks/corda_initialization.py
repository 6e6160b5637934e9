"""Initializes LoRA by the base's weights and the covariance of their inputs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from peft.tuners.lora.config import CordaConfig, LoraConfig
from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_lora.adapters.ranked_layer import RankedLayer
from lit_lora.argument_types import check_types
from lit_lora.callbacks.layer_rows import input_rows
from lit_lora.callbacks.rebased_initialization import (
    LayerSum,
    RebasedInitialization,
    linear_of,
    values_from_peft,
)


class CordaInitialization(RebasedInitialization):
    """Initializes LoRA with the components of the base's weights that matter most, or least, for the training's inputs.

    CorDA (Yang et al., 2024): with the covariance ``C = X^T X`` of a layer's inputs over some batches, ``W C = U S V^T``. The
    adapter's first values are ``r`` of the components of ``U S V^T C^-1 = W``, and the base keeps the others, so that training
    begins with the base's outputs. Convolutions are decomposed by patches of their inputs. PEFT computes the decomposition.

    Compare ``init_lora_weights: pissa``, which looks at the weights alone. It works with LoRA and rsLoRA in any
    LightningModule, on one device and with ``ddp``. Each layer's covariance takes four bytes for each pair of its inputs in host
    memory until it is initialized.

    Args:
        steps: Number of optimizer steps whose inputs are collected, and in which the LoRA layers do not learn; defaults to
            4.
        mode: ``ipm`` trains the components with the largest singular values, which adapts fastest; ``kpm`` those with the
            smallest, which keeps what the base can do with such inputs. Defaults to ``ipm``.

    Raises:
        UserError: If ``steps`` is below 1; when training starts, if the adapter is not LoRA, is DoRA or has values already,
            training ends within the steps, the base is quantized, or the strategy, another callback, ``compile_blocks``,
            ``offload_blocks`` or ``optimizer_in_backward`` exclude it.
    """

    def __init__(self, steps: int = 4, mode: Literal["ipm", "kpm"] = "ipm") -> None:
        check_types(CordaInitialization, locals())
        super().__init__(steps)
        self.mode: Literal["ipm", "kpm"] = mode

    def watch_layer(self, layer: RankedLayer, total: LayerSum) -> RemovableHandle:
        module: Any = layer.layer
        base: nn.Module = module.get_base_layer()

        @torch.no_grad()
        def take(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not module.training or not arguments:
                return
            rows = input_rows(base, arguments[0].detach().float())
            with torch.autocast(rows.device.type, enabled=False):
                total.add(rows.T @ rows, len(rows))

        handle: RemovableHandle = module.register_forward_pre_hook(take)
        return handle

    def first_values(self, layer: RankedLayer, total: LayerSum) -> tuple[Tensor, Tensor]:
        matrix = linear_of(layer)
        matrix.covariance_matrix = (total.total / total.rows).to(matrix.weight.device)
        options = CordaConfig(corda_method=self.mode)
        found = collect_eigens_for_layer(matrix, LoraConfig(init_lora_weights="corda", corda_config=options))
        chosen = slice(layer.rank) if self.mode == "ipm" else slice(-layer.rank, None)
        matrix.eigens = CordaEigens(
            S_WC=found.S_WC[chosen].clone(),
            U_WC=found.U_WC[:, chosen].to(matrix.weight.device),
            V_WC=found.V_WC[:, chosen].to(matrix.weight.device),
        )
        return values_from_peft(layer, matrix, init_lora_weights="corda", corda_config=options)
