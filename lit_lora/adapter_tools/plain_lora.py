"""Adapters as their LoRA layers, and what keeps an adapter from being nothing but these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import LoraConfig

from lit_lora.adapter_tools.lora_layer import LoraLayer
from lit_lora.adapters.names import PREFIX
from lit_lora.adapters.patterns import MOST_PATTERNS, grouped_patterns, pattern_value
from lit_lora.errors import UserError
from lit_lora.formats import AdapterFiles
from lit_lora.formats.lora import layers_of, only
from lit_lora.formats.text_encoders import portable_config

_BEYOND = (
    *(
        "alora_invocation_tokens",
        "arrow_config",
        "bias",
        "fan_in_fan_out",
        "kasa_config",
        "layer_replication",
        "lora_bias",
    ),
    *(
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
    ),
)
"""Options of PEFT's ``LoraConfig`` with which an adapter is more than ``scale * up @ down`` in single layers."""
_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", None)
"""Values of ``init_lora_weights`` that leave the base's weights as they are."""

Layers = dict[str, LoraLayer]
"""Layers by name."""


def beyond_lora(adapter: AdapterFiles) -> str:
    """The reason why an adapter is more than LoRA or DoRA in single layers, or something else; empty if it is not."""
    defaults = LoraConfig()
    for part in adapter.parts.values():
        kind = str(part.config.get("peft_type"))
        if kind != "LORA":
            return f"it is {kind}, which has no two factors per layer"
        for option in _BEYOND:
            value = part.config.get(option)
            if value and value != getattr(defaults, option, None):
                return f"it has {option}={value!r}, which is more than low-rank updates of layers"
        initial = part.config.get("init_lora_weights", True)
        if initial not in _KEEP_THE_BASE:
            return f"init_lora_weights={initial!r} changes the base's weights when the adapter is loaded"
    return ""


def lora_layers(adapter: AdapterFiles, path: object) -> dict[str, Layers]:
    """The layers of a LoRA or DoRA, by the names of its parts and the layers' own.

    Args:
        adapter: Adapter.
        path: Where it was read from, for errors.

    Raises:
        UserError: If the adapter has no layers or is more than LoRA or DoRA, its tensors are incomplete, or its config tells
            other ranks.
    """
    if not adapter.parts:
        raise UserError(
            f"{path} has new tokens alone ({', '.join(adapter.new_tokens)}), and this needs an adapter of layers"
        )
    if reason := beyond_lora(adapter):
        raise UserError(f"{path} cannot be used here: {reason}. LoRA (also rsLoRA) and DoRA can")
    parts: dict[str, Layers] = {}
    for name, part in adapter.parts.items():
        config, parts[name] = part.config, {}
        ranks = config.get("rank_pattern") or {}
        alphas = config.get("alpha_pattern") or {}
        for layer, tensors in layers_of(part.state, str(path)).items():
            rank = len(tensors["lora_A.weight"])
            told = pattern_value(ranks, layer, config.get("r"))
            if told != rank:
                raise UserError(
                    f"{path} is damaged: its config tells rank {told} for {layer}, and the tensors have rank {rank}; export it "
                    f"again"
                )
            alpha = pattern_value(alphas, layer, config.get("lora_alpha", rank))
            parts[name][layer] = LoraLayer(
                tensors["lora_A.weight"],
                tensors["lora_B.weight"],
                float(alpha),
                bool(config.get("use_rslora")),
                tensors.get("lora_magnitude_vector"),
            )
    return parts


def with_layers(adapter: AdapterFiles, parts: Mapping[str, Layers]) -> AdapterFiles:
    """The adapter with other tensors in the layers that it has, and configs that tell their ranks.

    Args:
        adapter: Adapter whose alphas hold for the new layers too.
        parts: Layers by part.
    """
    made = {}
    for name, part in adapter.parts.items():
        rank, ranks = patterns({layer: one.rank for layer, one in parts[name].items()})
        made[name] = (parts[name], {**part.config, "r": rank, "rank_pattern": ranks})
    return in_parts(adapter, made)


def in_parts(adapter: AdapterFiles, made: Mapping[str, tuple[Layers, Mapping[str, Any]]]) -> AdapterFiles:
    """The adapter with other layers and configs.

    Args:
        adapter: Adapter whose other entries hold.
        made: Layers and config by part.
    """
    parts = {
        name: AdapterFiles(
            {f"{PREFIX}{layer}.{end}": value for layer, one in layers.items() for end, value in one.tensors().items()},
            config if name == "denoiser" else portable_config(config),
        )
        for name, (layers, config) in made.items()
    }
    denoiser = parts.pop("denoiser", AdapterFiles({}, adapter.config))
    return replace(adapter, state=denoiser.state, config=denoiser.config, text_encoders=parts)


def patterns(values: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most frequent value, and patterns for the layers of all other values.

    Args:
        values: Values by layer.
    """
    usual = Counter(values.values()).most_common(1)[0][0]
    others = {layer: value for layer, value in values.items() if value != usual}
    if len(others) > MOST_PATTERNS:
        return usual, grouped_patterns(others)
    return usual, {only(layer): value for layer, value in sorted(others.items(), key=lambda item: item[1])}
