"""Initializes LoRA by the inputs of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lora.adapters.rank_selection import select_components
from lit_lora.adapters.ranked_layer import RankedLayer, note_ranks
from lit_lora.argument_types import check_types
from lit_lora.callbacks.first_steps import FirstSteps
from lit_lora.callbacks.layer_rows import input_rows
from lit_lora.distributed.collectives import broadcast, full_shape, full_tensor
from lit_lora.errors import UserError, check_least

_ROWS = 1024
"""Rows of a layer's input that are looked at in each batch."""


class EvaInitialization(FirstSteps):
    """Initializes LoRA from the layers' inputs, and gives more rank to layers whose inputs vary in more directions.

    EVA (Paischer et al., 2024): the rows of ``A`` become the right singular vectors of a layer's inputs, computed over some
    batches, and ``B`` becomes zero. The ranks of all layers together stay as many; each goes to the layer in which the next
    vector explains the largest share of the variance. Convolutions are initialized by patches of their inputs.

    The inputs are those of the first optimizer steps of the training itself. What these steps have learned is dropped when the
    adapter is initialized after them, so that no data is read twice, with any datamodule. Resuming is exact, also before the
    adapter is initialized. With several processes the inputs are those of the first one.

    It works with LoRA and rsLoRA in any LightningModule, under every strategy. The files are those of LoRA with a rank for each
    layer.

    Args:
        steps: Number of optimizer steps whose inputs are collected; defaults to 4.
        rho: Largest rank of a layer, as a multiple of its rank in the config; 1 keeps all ranks as they are. Defaults to 2.

    Raises:
        UserError: If ``steps`` or ``rho`` is below 1; when training starts, if the adapter is not LoRA or has values already,
            training ends within the steps, and with ``compile_blocks``; under DeepSpeed, after the first steps, if other
            parameters share the adapter's parameter group.
    """

    def __init__(self, steps: int = 4, rho: float = 2.0) -> None:
        check_types(EvaInitialization, locals())
        super().__init__(steps)
        check_least(1, rho=rho)
        self.rho = rho

    def _check_run(self, trainer: Trainer, module: Any) -> None:
        super()._check_run(trainer, module)
        if getattr(module, "compile_blocks", False):
            raise UserError(
                "EvaInitialization looks into layers of the blocks that are compiled with compile_blocks; set compile_blocks to "
                "false, or remove EvaInitialization from trainer.callbacks"
            )

    def watch(self, pl_module: LightningModule) -> None:
        if any(layer.config.use_dora for layer in self.layers):
            raise UserError(
                "EvaInitialization replaces weights from which DoRA has computed its magnitudes; leave use_dora out"
            )
        for layer in self.layers:
            most = max(1, min(round(layer.rank * self.rho), full_shape(layer.a)[1:].numel()))
            inputs = _Inputs(layer, most, (self.restored or {}).get(layer.path))
            self.seen[layer.path] = inputs
            module: Any = layer.layer
            self.hooks.append(module.register_forward_pre_hook(inputs.take))

    def initialize(self, trainer: Trainer, pl_module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        found: dict[str, tuple[Tensor, Tensor]] = broadcast(
            {path: inputs.components() for path, inputs in self.seen.items()}
        )
        known = [layer for layer in self.layers if len(found[layer.path][1])]
        budget = float(sum(layer.rank for layer in known))
        ranks = select_components([found[layer.path][1] for layer in known], [1.0] * len(known), budget)
        for layer, chosen in zip(known, ranks, strict=True):
            vectors = found[layer.path][0][chosen]
            out, _, *kernel = full_shape(layer.b)
            b = torch.zeros(out, len(chosen), *kernel)
            layer.replace(vectors.reshape(-1, *full_shape(layer.a)[1:]), b, optimizers)
        for layer in self.layers:
            if layer not in known:
                layer.replace(full_tensor(layer.a).detach(), torch.zeros(full_shape(layer.b)), optimizers)
        note_ranks(self.layers)
        after = [layer.rank for layer in self.layers]
        self.warn_of_left_out({layer.path for layer in known})
        rank_zero_info(
            f"EvaInitialization gave {len(known)} of {len(self.layers)} layers first values from their inputs, and ranks of "
            f"{min(after)} to {max(after)}"
        )


class _Inputs:
    """Principal components of a layer's inputs.

    Args:
        layer: The layer.
        most: Number of components.
        state: Result of :meth:`state`; defaults to none.
    """

    def __init__(self, layer: RankedLayer, most: int, state: dict[str, Any] | None = None) -> None:
        self._base: Any = layer.layer.get_base_layer()
        fast = 2 * most <= full_shape(layer.a)[1:].numel()  # torch.svd_lowrank computes twice as many components
        self._pca = IncrementalPCA(most, lowrank=fast, lowrank_seed=0)
        self._least = 4 * most if fast else most
        self._waiting: list[Tensor] = []
        """Rows that are not enough for a fit yet."""
        if state is not None:
            vars(self._pca).update(state["pca"])
            self._waiting = list(state["waiting"])

    @torch.no_grad()
    def take(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Hook before the layer's forward pass."""
        if not module.training or not arguments:
            return
        rows = input_rows(self._base, arguments[0].detach().float())
        rows = rows[:: max(1, len(rows) // _ROWS)][:_ROWS]
        if not rows.isfinite().all():  # FiniteGradients skips such a step
            return
        waiting = torch.cat([*(value.to(rows) for value in self._waiting), rows])
        self._waiting = [waiting]
        if len(waiting) >= self._least:
            with torch.autocast(rows.device.type, enabled=False):
                self._pca.partial_fit(waiting)
            self._waiting = []

    def components(self) -> tuple[Tensor, Tensor]:
        """Components, ``(k, in)``, and the share of the variance that each explains, ``(k,)``, on the CPU."""
        if not hasattr(self._pca, "components_"):
            return torch.zeros(0, 0), torch.zeros(0)
        ratio = self._pca.explained_variance_ratio_.float().nan_to_num(0.0, 0.0, 0.0)
        return self._pca.components_.float().cpu(), ratio.cpu()

    def state(self) -> dict[str, Any]:
        """State that a checkpoint can hold."""
        return {"pca": dict(vars(self._pca)), "waiting": list(self._waiting)}
