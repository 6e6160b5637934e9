"""LoRA, also where it has taken its first values out of the base's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lit_lora.adapters.keys import plain_config
from lit_lora.adapters.methods.block_by_block import BlockByBlockMethod
from lit_lora.adapters.names import PREFIX, tuner_layers
from lit_lora.adapters.patterns import layer_patterns
from lit_lora.errors import UserError
from lit_lora.quantization.frozen_layer import FrozenLayer

Factors = dict[str, tuple[Tensor, Tensor]]
"""``A`` and ``B`` of layers in float32 on the CPU, by the layer's name."""


class LoraMethod(BlockByBlockMethod):
    """LoRA: ``W + scaling * B A`` with a frozen ``W`` (Hu et al., 2021).

    Some initializations take the first values ``B0 A0`` out of the base, which keeps ``W - scaling * B0 A0``:
    :func:`rebase` does that. The files then hold the change against the original base, ``scaling * (B A - B0 A0)``, as LoRA of
    twice the rank, so that they load like every other LoRA. They do so too where the base has lost ``B0 A0`` by other means:
    :func:`leave_out`.
    """

    def state(self, model: PeftModel) -> dict[str, Any]:
        initial = initial_lora(model)
        if not initial:
            return {}
        own = {name: list(factors) for name, factors in initial.items()}
        return {"initial_lora": own, "rebased": vars(model).get("rebased", True)}

    def restore(self, model: PeftModel, state: dict[str, Any]) -> None:
        if "initial_lora" in state:
            move = rebase if state.get("rebased", True) else leave_out
            move(model, {name: (a, b) for name, (a, b) in state["initial_lora"].items()})

    @torch.no_grad()
    def export(
        self, model: PeftModel, state: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """LoRA as it is, or where the base has changed of twice the rank: ``[B, -B0] [A; A0]``."""
        initial = initial_lora(model)
        if not initial:
            return state, config
        exported = dict(state)
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for name, layer in tuner_layers(model, LoraLayer):
            key = f"{PREFIX}{name}.lora_"
            if name in initial:
                first_a, first_b = initial[name]
                exported[f"{key}A.weight"] = torch.cat([state[f"{key}A.weight"].cpu(), first_a])
                exported[f"{key}B.weight"] = torch.cat([state[f"{key}B.weight"].cpu(), -first_b], dim=1).contiguous()
                ranks[name] = len(exported[f"{key}A.weight"])
            else:
                (ranks[name],) = layer.r.values()
            (scaling,) = layer.scaling.values()
            alphas[name] = scaling * (math.sqrt(ranks[name]) if config["use_rslora"] else ranks[name])
        kept = {name: value for name, value in config.items() if name not in ("r", "lora_alpha", "init_lora_weights")}
        own = plain_config(LoraConfig(r=max(ranks.values()), lora_alpha=max(alphas.values())))
        return exported, own | kept | {"rank_pattern": layer_patterns(ranks), "alpha_pattern": layer_patterns(alphas)}


def initial_lora(model: PeftModel) -> Factors:
    """The first values that the base has lost and the files leave out; empty if the base is the original one."""
    found: Factors = vars(model).get("initial_lora", {})
    return found


def leave_out(model: PeftModel, factors: Factors) -> None:
    """Let the files leave out first values that the base has lost already, such as a part of the error of its quantization.

    Args:
        model: Model with a LoRA adapter.
        factors: First values, equal in all processes.
    """
    model.__dict__.update(initial_lora=factors, rebased=False)


@torch.no_grad()
def rebase(model: PeftModel, factors: Factors) -> None:
    """Let the base keep what these first values leave of its original weights: ``W - scaling * B0 A0``.

    First values that were taken out before are put back. A layer whose first values are the same does not change. The adapter's
    own values do not change either.

    Args:
        model: Model with a LoRA adapter.
        factors: First values, equal in all processes.

    Raises:
        UserError: If a layer's weight is quantized.
    """
    before = initial_lora(model)
    for name, layer in tuner_layers(model, LoraLayer):
        old, new = before.get(name), factors.get(name)
        if old is new or (old and new and all(map(torch.equal, old, new))):
            continue
        base = layer.get_base_layer()
        if isinstance(base, FrozenLayer) and not base.is_dense:
            raise UserError(
                f"the adapter has taken its first values out of the base's weights, and {name} is stored as "
                f"{type(base.quantization).__name__}; resume without model.quantization, as the training began"
            )
        (scaling,) = layer.scaling.values()
        # On the CPU, where a resumed run computes it too.
        difference = scaling * (_product(old, base.weight) - _product(new, base.weight))
        base.weight.data = (base.weight.data.float() + difference.to(base.weight.device)).to(base.weight.dtype)
    model.__dict__["initial_lora"] = factors


def _product(factors: tuple[Tensor, Tensor] | None, weight: Tensor) -> Tensor:
    """``B A`` in the shape of the weight; zeros without factors."""
    if factors is None:
        return torch.zeros(weight.shape)
    a, b = factors
    return (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
