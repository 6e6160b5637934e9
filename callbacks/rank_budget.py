"""Prunes the ranks of a LoRA to a budget while it trains."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_lora.adapters import ADAPTER_NAME, adapter_state, method_of, plain_config
from lit_lora.adapters.in_place import peft_models
from lit_lora.adapters.parameter_groups import plain_name
from lit_lora.adapters.rank_selection import select_components
from lit_lora.adapters.ranked_layer import RankedLayer, check_prunable, note_ranks
from lit_lora.argument_types import check_types
from lit_lora.blocks import compile_for_any_rank
from lit_lora.byte_sizes import parse_bytes
from lit_lora.callbacks.changed_ranks import ChangedRanks
from lit_lora.callbacks.logged_image import log_image
from lit_lora.distributed.collectives import broadcast, sum_of_shards
from lit_lora.distributed.resized import resizing
from lit_lora.errors import UserError, check_least, check_whole
from lit_lora.formats.peft import safetensors_bytes
from lit_lora.loops import number_of_steps
from lit_lora.profiling.rank_chart import rank_chart

_PARAMETER_BYTES = 4
"""Adapters are trained and saved in float32."""

_METADATA_BYTES = 4096
"""Room in the file for what it says of base and training; most files take less than a third of it."""


class RankBudget(ChangedRanks):
    """Starts LoRA with a larger rank and prunes it to a budget while it trains, so that each layer keeps the ranks it needs.

    LoRA adds ``scaling * B A`` to a frozen weight. What it has learned is spread over all ``r`` components ``B[:, i] A[i]``, so
    that none can go without a loss. Therefore, the components are first rotated so that the columns of ``B`` are orthogonal,
    which does not change ``B A``: a few of these hold most of what was learned, and in some layers fewer than in others. At each
    optimizer step, each is scored by how much the loss depends on it. To second order, the loss rises by about half the mean of
    ``<B[:, i], dL/dB[:, i]>^2`` without it (Fisher pruning, Theis et al., 2018; Molchanov et al., 2019). At each pruning,
    components of all layers compete by their score since the last one for each parameter that they cost. Those with the lowest
    scores are removed from the weights, the gradients and the optimizer's state, whose memory becomes free. The budget falls
    cubically, as in AdaLoRA (Zhang et al., 2023): quickly at first, slowly at the end.

    The result is an ordinary LoRA with a rank for each layer (``rank_pattern``, ``alpha_pattern``), which PEFT and diffusers
    load. It works with LoRA, rsLoRA and DoRA in any LightningModule, with :class:`AdapterCheckpoint`, :class:`AdapterEMA`, and
    under ``ddp``, ``lit_lora_fsdp`` and DeepSpeed's ZeRO. Resuming is exact. The metrics ``ranks/mean`` and
    ``ranks/parameters`` show the progress, and a chart of the ranks goes to TensorBoard, Weights & Biases or MLflow.

    Exactly one of the first four arguments sets the budget at the end of the schedule.

    Args:
        mean_rank: Mean rank of the layers; every component costs the same.
        parameters: Number of parameters in ``A`` and ``B`` of all layers together.
        share: Share of the parameters that training starts with, in (0, 1).
        file_size: Size that ``adapter_model.safetensors`` stays below, in bytes, or with a unit, such as ``"20MB"``; with trained
            text encoders their files count too.
        start: Share of the optimizer steps before the first pruning, in [0, 1); defaults to 0.1.
        stop: Share of the optimizer steps after which the budget is reached, in (0, 1]; defaults to 0.6. The remaining steps
            train with the final ranks.
        prunings: Number of prunings between them; defaults to 10.
        min_rank: Rank that each layer keeps; defaults to 1.

    Raises:
        UserError: If not exactly one budget is given, or a value is outside its range; when training starts, if the adapter is
            not LoRA, the budget is below ``min_rank`` in each layer or not below the ranks at the start, the number of optimizer
            steps is unknown; after the first step, if the optimizer does not keep one value for each weight.
    """

    def __init__(
        self,
        mean_rank: float | None = None,
        parameters: int | None = None,
        share: float | None = None,
        file_size: int | str | None = None,
        start: float = 0.1,
        stop: float = 0.6,
        prunings: int = 10,
        min_rank: int = 1,
    ) -> None:
        check_types(RankBudget, locals())
        super().__init__()
        check_whole(1, prunings=prunings, min_rank=min_rank, parameters=parameters)
        given = {"mean_rank": mean_rank, "parameters": parameters, "share": share, "file_size": file_size}
        if len(set_ones := [f"{name}={value}" for name, value in given.items() if value is not None]) != 1:
            raise UserError(
                f"RankBudget needs exactly one of {', '.join(given)}, not {' and '.join(set_ones) or 'none of them'}"
            )
        check_least(1, mean_rank=mean_rank)
        if share is not None and not 0 < share < 1:
            raise UserError(f"share={share} must lie between 0 and 1: it is the part of the parameters that remains")
        if not 0 <= start < stop <= 1:
            raise UserError(
                f"start={start} and stop={stop} must be shares of the optimizer steps with 0 <= start < stop <= 1"
            )
        self.mean_rank = mean_rank
        self.parameters = parameters
        self.share = share
        self.file_bytes = None if file_size is None else parse_bytes("file_size", file_size)
        self.start = start
        self.stop = stop
        self.prunings = prunings
        self.min_rank = min_rank
        self._first_ranks: dict[str, int] = {}
        self._axes: dict[str, Tensor] = {}
        """Axes of the components that are scored, by the layer's path; empty until scoring begins, and after each pruning."""
        self._scores: Tensor | None = None
        """Sum over the steps since the axes were found, of all layers one after the other."""
        self._above = False
        """Whether there is more than the budget at the end."""
        self._schedule: dict[int, float] = {}
        self._total_steps = 0
        self._step = 0
        self._checked = False
        """Whether the optimizers' states are known to be such that they can be pruned; they exist after the first step."""
        self._early: dict[str, Tensor] = {}
        """Derivatives of this step by the layer's path, where gradients do not last until the optimizer step."""
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._first_ranks, self._axes, self._scores, self._total_steps = {}, {}, None, 0
        self._remove_hooks()
        if getattr(pl_module, "compile_blocks", False):
            compile_for_any_rank()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove_hooks()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not getattr(getattr(pl_module, "memory", None), "optimizer_in_backward", False):
            return
        self.find_layers(pl_module)
        # The module's own hooks, which step the optimizer and free gradients, are made after this, and called after these.
        self._hooks = [
            layer.b.register_post_accumulate_grad_hook(partial(self._take_early, layer)) for layer in self.layers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.find_layers(pl_module)
        first = sum(rank * cost for rank, cost in zip(self._first_ranks.values(), self._costs(), strict=True))
        final = self._budget(first, pl_module)
        self._check_least(final, pl_module)
        if final >= first:
            raise UserError(
                f"RankBudget's budget of {final:,.0f} {self._unit} is not below the {first:,.0f} at the start, so nothing would "
                f"be pruned; lower the budget, or raise the adapter's r"
            )
        self._set_total_steps(trainer)
        begin, end = self.start * self._total_steps, self.stop * self._total_steps
        self._schedule = {}
        for number in range(1, self.prunings + 1):
            step = begin + (end - begin) * (number - 1) / (self.prunings - 1) if self.prunings > 1 else end
            self._schedule[max(1, round(step))] = final + (first - final) * (1 - number / self.prunings) ** 3
        if trainer.global_step >= (last := max(self._schedule)) and self._used() > final:
            raise UserError(
                f"RankBudget prunes the last time at step {last} of {self._total_steps}, and this run resumes at step "
                f"{trainer.global_step} with {self._used():,.0f} {self._unit}, more than its budget of {final:,.0f}, so nothing "
                f"would be pruned; raise stop, or start without ckpt_path"
            )
        self._axes = {layer.path: self._axes[layer.path].to(layer.b.device) for layer in self.layers if self._axes}
        if self._scores is not None:
            self._scores = self._scores.to(self.layers[0].b.device)
        self._above = self._used() > final
        self._step, self._checked = trainer.global_step, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._above:
            self._remove_hooks()
        elif not self._axes and trainer.global_step >= min(self._schedule) // 2:
            axes = broadcast({layer.path: layer.principal_axes().cpu() for layer in self.layers})
            self._axes = {layer.path: axes[layer.path].to(layer.b.device) for layer in self.layers}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._axes:
            return
        found = []
        for layer in self.layers:
            gradients = self._early.pop(layer.path, None)
            if gradients is None:
                gradients = layer.gate_gradients(self._axes[layer.path])
            found.append(torch.zeros(layer.rank, device=layer.b.device) if gradients is None else gradients)
        whole = _whole(self.layers, found)
        scores = whole.square().nan_to_num(0.0, 0.0, 0.0)  # FiniteGradients skips such a step
        self._scores = scores if self._scores is None else self._scores + scores

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        if not self._checked and self._above:
            self._checked = check_prunable(self.layers, trainer.optimizers)
        self._step = trainer.global_step
        due = min((budget for step, budget in self._schedule.items() if step <= self._step), default=math.inf)
        # Without a step that was scored, a pruning waits for the next.
        if self._scores is not None and self._used() > due and bool(self._scores.any()):
            self._prune(trainer, due, self._scores)
            self._draw(trainer)
        ranks = [layer.rank for layer in self.layers]
        pl_module.log("ranks/mean", sum(ranks) / len(ranks), batch_size=1)
        parameters = sum(layer.rank * layer.component_parameters for layer in self.layers)
        pl_module.log("ranks/parameters", float(parameters), batch_size=1)

    def on_adapter_replaced(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the new components anew; :class:`EvaInitialization` calls this."""
        self._axes, self._scores = {}, None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = max(self._schedule, default=0)
        if self._above:
            rank_zero_warn(
                f"training has ended at step {trainer.global_step}, and RankBudget reaches its budget at step {last} of "
                f"{self._total_steps}; the adapter is larger than the budget"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "axes": {path: value.cpu() for path, value in self._axes.items()},
            "scores": None if self._scores is None else self._scores.cpu(),
            "first_ranks": self._first_ranks,
            "total_steps": self._total_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._axes, self._scores = dict(state_dict["axes"]), state_dict["scores"]
        self._first_ranks = dict(state_dict["first_ranks"])
        self._total_steps = int(state_dict["total_steps"])

    def last_parameters(self, first: int, rank: int, other_bytes: int) -> int:
        """About how many parameters the schedule leaves.

        Args:
            first: Number of the adapter's parameters at the start.
            rank: Rank of every layer at the start.
            other_bytes: Bytes of the adapter's file beside the parameters.
        """
        if self.parameters is not None:
            return min(first, self.parameters)
        if self.file_bytes is not None:
            return min(first, (self.file_bytes - other_bytes - _METADATA_BYTES) // _PARAMETER_BYTES)
        return round(first * (self.share if self.share is not None else min(1.0, (self.mean_rank or 0) / rank)))

    @property
    def _unit(self) -> str:
        return "ranks" if self.mean_rank is not None else "parameters"

    def find_layers(self, module: nn.Module) -> None:
        super().find_layers(module)
        if not self._first_ranks:
            self._first_ranks = {layer.path: layer.rank for layer in self.layers}

    def _set_total_steps(self, trainer: Trainer) -> None:
        """Take the trainer's steps for the schedule, or the checkpoint's if its schedule has begun."""
        has_begun = bool(self._axes) or any(layer.rank != self._first_ranks[layer.path] for layer in self.layers)
        steps = trainer.estimated_stepping_batches
        if self._total_steps and not math.isfinite(steps):
            return  # nothing but time ends this run
        if not (self._total_steps and has_begun):
            self._total_steps = number_of_steps(trainer, "RankBudget")
        elif steps != self._total_steps:
            rank_zero_warn(
                f"RankBudget keeps the schedule of its checkpoint, which is made for {self._total_steps} optimizer steps and "
                f"has begun; the {steps} of this run do not change when ranks are pruned"
            )

    def _used(self) -> float:
        """What the layers take of the budget now."""
        return sum(layer.rank * cost for layer, cost in zip(self.layers, self._costs(), strict=True))

    def _costs(self) -> list[float]:
        """Cost of one component of each layer."""
        return [1.0 if self.mean_rank is not None else float(layer.component_parameters) for layer in self.layers]

    def _budget(self, first: float, module: nn.Module) -> float:
        """The budget at the end of the schedule, in ranks or parameters."""
        if self.mean_rank is not None:
            return self.mean_rank * len(self.layers)
        if self.share is not None:
            return self.share * first
        if self.parameters is not None:
            return float(self.parameters)
        assert self.file_bytes is not None
        return (self.file_bytes - _other_bytes(module, self.layers)) / _PARAMETER_BYTES

    def _check_least(self, final: float, module: nn.Module) -> None:
        """Refuse a budget below ``min_rank`` in every layer now, and not at the first pruning."""
        least = sum(
            cost * min(self.min_rank, layer.rank) for layer, cost in zip(self.layers, self._costs(), strict=True)
        )
        if least <= final:
            return
        cost = f"what min_rank={self.min_rank} in each of the {len(self.layers)} layers takes"
        if self.file_bytes is None:
            told = f"budget of {final:,.0f} {self._unit} is below {least:,.0f}, {cost}"
        else:
            needed = math.ceil(least * _PARAMETER_BYTES + _other_bytes(module, self.layers))
            told = f"file_size of {self.file_bytes:,} bytes is below {needed:,}, {cost}"
        raise UserError(f"RankBudget's {told}; raise the budget, or adapt fewer layers with target_modules")

    def _prune(self, trainer: Trainer, budget: float, scores: Tensor) -> None:
        before = [layer.rank for layer in self.layers]
        chosen = select_components(list(scores.cpu().split(before)), self._costs(), budget, self.min_rank)
        changes = []
        with resizing(trainer.strategy) as optimizers:
            for layer, kept in zip(self.layers, chosen, strict=True):
                if len(kept) < layer.rank:
                    axes = self._axes[layer.path]
                    changes += layer.keep(axes[:, kept.to(axes.device)], optimizers)
        self._axes, self._scores = {}, None
        self._above = self._used() > min(self._schedule.values())
        note_ranks(self.layers)
        self.changed(trainer, "on_ranks_pruned", changes)
        after = [layer.rank for layer in self.layers]
        rank_zero_info(
            f"RankBudget pruned {sum(before) - sum(after):,} of {sum(before):,} ranks at step {trainer.global_step}: "
            f"{min(after)} to {max(after)} for each of {len(after)} layers, {sum(after) / len(after):.2f} on average"
        )

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        several = len({id(layer.config) for layer in self.layers}) > 1
        ranks = {
            plain_name(layer.path) if several else layer.name: (layer.rank, self._first_ranks[layer.path])
            for layer in self.layers
        }
        chart = rank_chart(ranks, f"ranks at step {trainer.global_step}")
        for logger in trainer.loggers:
            log_image(logger, "ranks", chart, trainer.global_step)

    def _take_early(self, layer: RankedLayer, _: Tensor) -> None:
        if layer.path in self._axes:
            gradients = layer.gate_gradients(self._axes[layer.path])
            assert gradients is not None
            self._early[layer.path] = gradients

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._early = [], {}


def _whole(layers: list[RankedLayer], gradients: list[Tensor]) -> Tensor:
    """Derivatives of all layers one after the other; what FSDP2 shards is summed over the processes in one call."""
    sharded = [number for number, layer in enumerate(layers) if isinstance(layer.b, DTensor)]
    if sharded:
        parts = [gradients[number] for number in sharded]
        whole = sum_of_shards(torch.cat(parts), layers[sharded[0]].b).split([len(part) for part in parts])
        gradients = [*gradients]
        for number, value in zip(sharded, whole, strict=True):
            gradients[number] = value
    return torch.cat(gradients)


def _other_bytes(module: nn.Module, layers: list[RankedLayer]) -> int:
    """Bytes of ``adapter_model.safetensors``, of all adapted parts together, beside the weights of the ranked layers."""
    ranked = sum(layer.rank * layer.component_parameters for layer in layers)
    files = _METADATA_BYTES
    for _, model in peft_models(module):
        config = model.peft_config[ADAPTER_NAME]
        # Whole tensors without values: under FSDP2 the adapter's are shards.
        state = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in adapter_state(model).items()}
        files += safetensors_bytes(method_of(config).planned(model, state, plain_config(config))[0])
    return files - _PARAMETER_BYTES * ranked
