"""LoRA that starts from parts of the base's weights: PiSSA and OLoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lit_lora.adapters.keys import plain_config
from lit_lora.adapters.methods.base import AdapterMethod
from lit_lora.adapters.names import PREFIX, tuner_layers
from lit_lora.adapters.patterns import layer_patterns
from lit_lora.distributed.collectives import broadcast
from lit_lora.errors import UserError
from lit_lora.quantization.frozen_layer import frozen_layers

Factors = dict[str, tuple[Tensor, Tensor]]
"""``A`` and ``B`` of each layer on the CPU, by the layer's name."""


def is_rebased(initialization: object) -> bool:
    """Whether this ``init_lora_weights`` takes the adapter's first values out of the base's weights."""
    return isinstance(initialization, str) and (
        initialization.lower() == "olora"
        or initialization == "pissa"
        or (initialization.startswith("pissa_niter_") and initialization[12:].isdecimal())
    )


class RebasedLoraMethod(AdapterMethod):
    """LoRA with ``init_lora_weights`` PiSSA (Meng et al., 2024) or OLoRA (Büyükakyüz, 2024).

    The first values ``B0 A0`` are the largest part of the weight, and the base keeps the rest, ``W - scaling B0 A0``. The files
    hold the change against the original base, ``scaling (B A - B0 A0)``, as LoRA of twice the rank, so that they load like every
    other LoRA.
    """

    def check(self, model: nn.Module, config: PeftConfig) -> None:
        quantised = [layer for layer in frozen_layers(model) if not layer.is_dense]
        if quantised:
            raise UserError(
                f"init_lora_weights of PiSSA and OLoRA moves a part of the base's weights into the adapter, and {len(quantised)} "
                f"layers are stored as {type(quantised[0].quantization).__name__}; leave model.quantization out, or set "
                f"init_lora_weights to true"
            )
        if getattr(config, "use_dora", False):
            raise UserError(
                "init_lora_weights of PiSSA and OLoRA cannot be combined with use_dora, whose magnitudes would be those of the "
                "changed base; set one of them to its default"
            )

    def injected(self, model: PeftModel) -> None:
        own = _factors(model)
        object.__setattr__(model, "initial_lora", own)
        _move_base(model, broadcast(own))
        for name, layer in tuner_layers(model, LoraLayer):
            for weight, value in zip(_weights(layer), model.initial_lora[name], strict=True):
                weight.data.copy_(value)

    def state(self, model: PeftModel) -> dict[str, Any]:
        return {"initial_lora": {name: list(factors) for name, factors in model.initial_lora.items()}}

    def restore(self, model: PeftModel, state: dict[str, Any]) -> None:
        if not state:
            return
        _move_base(model, {name: (a, b) for name, (a, b) in state["initial_lora"].items()})

    @torch.no_grad()
    def export(
        self, model: PeftModel, state: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """LoRA of twice the rank: ``[B, -B0] [A; A0]``."""
        exported = dict(state)
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for name, layer in tuner_layers(model, LoraLayer):
            first_a, first_b = model.initial_lora[name]
            key = f"{PREFIX}{name}.lora_"
            exported[f"{key}A.weight"] = torch.cat([state[f"{key}A.weight"].cpu(), first_a])
            exported[f"{key}B.weight"] = torch.cat([state[f"{key}B.weight"].cpu(), -first_b], dim=1).contiguous()
            ranks[name] = len(exported[f"{key}A.weight"])
            (scaling,) = layer.scaling.values()
            alphas[name] = scaling * (math.sqrt(ranks[name]) if config["use_rslora"] else ranks[name])
        most = max(ranks.values())
        kept = {name: value for name, value in config.items() if name not in ("r", "lora_alpha", "init_lora_weights")}
        own = plain_config(LoraConfig(r=most, lora_alpha=max(alphas.values())))
        return exported, own | kept | {
            "rank_pattern": layer_patterns(ranks),
            "alpha_pattern": layer_patterns(alphas),
        }


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    (down,), (up,) = layer.lora_A.values(), layer.lora_B.values()
    return down.weight, up.weight


def _factors(model: PeftModel) -> Factors:
    found: Factors = {}
    for name, layer in tuner_layers(model, LoraLayer):
        a, b = _weights(layer)
        found[name] = (a.detach().float().cpu().clone(), b.detach().float().cpu().clone())
    return found


@torch.no_grad()
def _move_base(model: Any, factors: Factors) -> None:
    """Let the base keep what these first values leave of the original weights.

    Nothing changes where they are the values that were taken out here. They differ where another machine computed them.
    """
    if factors is model.initial_lora:
        return
    for name, layer in tuner_layers(model, LoraLayer):
        (a, b), (here_a, here_b) = factors[name], model.initial_lora[name]
        if torch.equal(a, here_a) and torch.equal(b, here_b):
            continue
        (scaling,) = layer.scaling.values()
        weight = layer.get_base_layer().weight
        difference = scaling * (here_b @ here_a - b @ a)
        weight.data = (weight.data.float() + difference.to(weight.device)).to(weight.dtype)
    model.initial_lora = factors
