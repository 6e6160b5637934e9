"""Merges an adapter into weights, one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lit_lora.adapters import ADAPTER_NAME, load_adapter
from lit_lora.adapters.names import PREFIX, tuner_layers
from lit_lora.adapters.patterns import pattern_value
from lit_lora.errors import UserError
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.lora import adapted_layer

_METHODS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""Methods that add a matrix to each weight, each with the name of its alpha in PEFT's config."""
_CHOICE_OF_LAYERS = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"))


@dataclass(frozen=True)
class MergedLayer:
    """The update of one layer's weight, as PEFT computes it.

    Args:
        path: File of the adapter, for errors.
        name: Name of the layer.
        config: Plain PEFT config for a model that has only this layer, which is called ``layer``.
        state: Tensors of the layer under PEFT's names in such a model.
        factor: Factor of the update: what diffusers calls the adapter's weight.
    """

    path: str
    name: str
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    factor: float

    @torch.no_grad()
    def update(self, weight: Tensor) -> Tensor:
        """The change of a weight.

        Args:
            weight: Weight of the base, float32 ``(out, in)`` or ``(out, in, height, width)``.

        Raises:
            UserError: If the adapter's tensors do not fit the weight.
        """
        base: nn.Module
        if weight.ndim == 2:
            base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        else:
            base = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False, device="meta")  # type: ignore[arg-type]
        dora = bool(self.config.get("use_dora"))
        base.weight = nn.Parameter(weight.clone() if dora else weight, requires_grad=False)
        try:
            adapted = load_adapter(nn.ModuleDict({"layer": base}), self.config, self.state, self.path)
        except UserError as error:
            shapes = ", ".join(f"{key.rpartition('layer.')[2]} {tuple(one.shape)}" for key, one in self.state.items())
            raise UserError(
                f"the adapter {self.path} does not fit the base: the weight of {self.name} is {tuple(weight.shape)}, and the "
                f"adapter has {shapes}; name an adapter of this base"
            ) from error
        ((_, layer),) = tuner_layers(adapted, BaseTunerLayer)
        layer.scale_layer(self.factor)
        if not dora:
            added: Tensor = layer.get_delta_weight(ADAPTER_NAME)
            return added
        layer.merge()
        return base.weight - weight


def merged_layers(adapter: AdapterFiles, path: str, factor: float) -> dict[str, MergedLayer]:
    """The updates of one part of an adapter, by the name of the layer.

    Args:
        adapter: LoRA, DoRA, LoHa or LoKr of one model.
        path: File of the adapter, for errors.
        factor: Factor of the updates.

    Raises:
        UserError: If the adapter is of another method, or holds more than updates of layers.
    """
    kind = str(adapter.config.get("peft_type"))
    advice = "merge it into the base with lit-lora adapter merge --into, and train on the result"
    if kind not in _METHODS:
        raise UserError(
            f"{path} is an adapter of the method {kind}, and those that can be merged while the base is loaded are "
            f"{', '.join(_METHODS)}; {advice}"
        )
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in adapter.state.items():
        name = adapted_layer(key)
        if not name or key.endswith(".lora_B.bias"):
            raise UserError(f"{path} holds {key}, which is more than updates of layers; {advice}")
        states.setdefault(name, {})[f"{PREFIX}layer{key.removeprefix(PREFIX + name)}"] = value
    return {
        name: MergedLayer(path, name, _config_of(name, adapter.config, _METHODS[kind]), state, factor)
        for name, state in states.items()
    }


def _config_of(layer: str, config: Mapping[str, Any], alpha: str) -> dict[str, Any]:
    """The config for a model that has only this layer."""

    def value(option: str, pattern: str) -> Any:
        values = config.get(pattern) or {}
        return pattern_value(values, layer, config.get(option))

    own = {"r": value("r", "rank_pattern"), alpha: value(alpha, "alpha_pattern"), "target_modules": ["layer"]}
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    initial = {name: True for name in ("init_lora_weights", "init_weights") if name in config}
    return {name: one for name, one in config.items() if name not in _CHOICE_OF_LAYERS} | own | patterns | initial
