"""AdaLoRA: rank allocation that PEFT expects the training loop to call, to schedule and to save."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor

from lit_lora.adapters.keys import plain_config
from lit_lora.adapters.methods.base import AdapterMethod
from lit_lora.adapters.names import PREFIX, tuner_layers
from lit_lora.adapters.patterns import layer_patterns
from lit_lora.errors import UserError
from lit_lora.quantization.frozen_layer import FrozenLayer

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Tensors of the rank allocator, each the size of the trained weights: importance, its average and its uncertainty."""


class AdaLoraMethod(AdapterMethod):
    """AdaLoRA (Zhang et al., 2023): ``W + scaling * B diag(E) A``, where a schedule prunes entries of ``E`` with low importance.

    Importance is an average of ``|weight * gradient|`` over the steps, and ranks compete across all layers. A penalty keeps the
    rows of ``A`` and the columns of ``B`` close to orthogonal, so that the entries of ``E`` are comparable. The schedule ends
    with the trainer's optimizer steps, whatever ``total_step`` is. The files hold the result as LoRA with a rank per layer.
    """

    whole_gradients: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    block_by_block: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True
    schedule_fields: ClassVar[frozenset[str]] = frozenset(
        {"total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "target_r", "orth_reg_weight", "rank_pattern"}
    )
    rank_field: ClassVar[str | None] = None  # init_r and target_r set it together

    def start(self, model: PeftModel, steps: int) -> None:
        allocator = model.base_model.rankallocator
        config = allocator.peft_config
        if _is_pruned(model):  # in the run of the checkpoint
            allocator.set_total_step(steps)
            return
        if config.tinit + config.tfinal >= steps:
            raise UserError(
                f"AdaLoRA prunes between the first tinit={config.tinit} and the last tfinal={config.tfinal} optimizer steps, and "
                f"training takes {steps} steps; lower tinit and tfinal, or raise trainer.max_steps"
            )
        if config.total_step != steps:
            warnings.warn(
                f"AdaLoRA's schedule follows the trainer's {steps} optimizer steps; total_step={config.total_step} is not used",
                stacklevel=2,
            )
        allocator.set_total_step(steps)

    def penalty(self, model: PeftModel) -> Tensor | None:
        """``orth_reg_weight`` times the mean of ``|A A^T - I|`` and ``|B^T B - I|`` over all layers, in Frobenius norms."""
        weight = model.base_model.rankallocator.peft_config.orth_reg_weight
        if not weight:
            return None
        norms = []
        for _, layer in tuner_layers(model, AdaLoraLayer):
            (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
            for gram in (a @ a.T, b.T @ b):
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        penalty: Tensor = weight * torch.stack(norms).mean()
        return penalty

    def after_step(self, model: PeftModel, step: int) -> None:
        config = model.base_model.rankallocator.peft_config
        if _is_pruned(model):  # the schedule of a run that was made longer would begin anew, without importances
            model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, config.rank_pattern)
            return
        # The importance comes from gradients, and a step that was skipped has none; the end of the schedule reads none.
        if step != config.total_step - config.tfinal and not _has_gradients(model):
            return
        for _, layer in tuner_layers(model, AdaLoraLayer):
            for parameter in (*layer.lora_A.values(), *layer.lora_B.values(), *layer.lora_E.values()):
                if not parameter.requires_grad:  # a layer whose output nobody reads has no importance
                    parameter.grad = torch.zeros_like(parameter)
        model.base_model.update_and_allocate(step)

    def state(self, model: PeftModel) -> dict[str, Any]:
        allocator = model.base_model.rankallocator
        averages = {name: dict(getattr(allocator, name)) for name in _AVERAGES}
        return averages | {"rank_pattern": allocator.peft_config.rank_pattern}

    def restore(self, model: PeftModel, state: dict[str, Any]) -> None:
        if not state:
            return
        allocator = model.base_model.rankallocator
        devices = {name: parameter.device for name, parameter in model.base_model.model.named_parameters()}
        for name in _AVERAGES:
            setattr(allocator, name, {key: value.to(devices[key]) for key, value in state[name].items()})
        allocator.peft_config.rank_pattern = state["rank_pattern"]

    def state_bytes(self, model: PeftModel) -> int:
        ranked = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        return len(_AVERAGES) * sum(parameter.nbytes for parameter in ranked)

    @torch.no_grad()
    def export(
        self, model: PeftModel, state: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """LoRA with a rank for each layer; the entries of ``E`` and the scaling are multiplied into ``A``."""
        return _as_lora(
            model, state, config, {name: _product(layer) for name, layer in tuner_layers(model, AdaLoraLayer)}
        )

    def planned(
        self, model: PeftModel, state: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Every layer with ``target_r``, which is the mean of the ranks at the end."""
        factors = {}
        for name, layer in tuner_layers(model, AdaLoraLayer):
            (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
            rank = min(config["target_r"], len(a))
            factors[name] = (a.detach()[:rank], b.detach()[:, :rank])
        return _as_lora(model, state, config, factors)


def _is_pruned(model: PeftModel) -> bool:
    """Whether the schedule has ended: then PEFT forgets the importances, and the ranks stay."""
    allocator = model.base_model.rankallocator
    return bool(allocator.peft_config.rank_pattern) and not allocator.exp_avg_ipt


def _has_gradients(model: PeftModel) -> bool:
    return any(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)


def _as_lora(
    model: PeftModel,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    factors: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """LoRA whose updates are ``B A`` for the given ``A`` and ``B`` of each layer."""
    others = {key: value for key, value in state.items() if ".lora_" not in key}
    exported: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in tuner_layers(model, AdaLoraLayer):
        a, b = factors[name]
        ranks[name] = len(a)
        base = layer.get_base_layer()
        shape = base.weight_shape if isinstance(base, FrozenLayer) else base.weight.shape  # (out, in, *kernel)
        exported[f"{PREFIX}{name}.lora_A.weight"] = a.reshape(-1, *shape[1:]).cpu().contiguous()
        exported[f"{PREFIX}{name}.lora_B.weight"] = b.reshape(*b.shape, *(1 for _ in shape[2:])).cpu().contiguous()
    pattern = layer_patterns(ranks)
    most = max(ranks.values())
    lora = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=config["target_modules"],
        modules_to_save=config.get("modules_to_save"),
        bias=config.get("bias", "none"),
    )
    kept = {
        name: config[name] for name in ("base_model_name_or_path", "auto_mapping", "exclude_modules") if name in config
    }
    return exported | others, plain_config(lora) | kept


def _product(layer: Any) -> tuple[Tensor, Tensor]:
    """``scaling diag(E) A`` and ``B`` without the entries that were pruned, but for one."""
    (name,) = layer.lora_A
    a, b, e = layer.lora_A[name].detach(), layer.lora_B[name].detach(), layer.lora_E[name].detach()
    kept = e.flatten().nonzero().flatten()
    if not len(kept):
        kept = torch.zeros(1, dtype=torch.int64, device=e.device)
    scaling = layer.scaling[name] / (layer.ranknum[name].detach() + 1e-5)
    return a[kept] * (e[kept] * scaling), b[:, kept]
