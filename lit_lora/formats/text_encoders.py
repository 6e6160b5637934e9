"""Names of a CLIP text encoder's layers, which differ between versions of transformers.

Since transformers 5 the layers of ``CLIPTextModel`` are no longer below ``text_model``. Here tensors always have the longer
names, as other tools write them, and configs the shorter ones, which PEFT takes as the ends of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.adapters.names import PREFIX
from lit_lora.errors import UserError
from lit_lora.formats.base import AdapterFiles

_MODEL = "text_model."


def nested(layer: str) -> str:
    """The longer name of a layer; names of other encoders than CLIP stay."""
    return _MODEL + layer if layer.startswith("encoder.layers.") else layer


def normalized(adapter: AdapterFiles) -> AdapterFiles:
    """An adapter of a text encoder with longer names of tensors and shorter ones in the config.

    Args:
        adapter: Adapter of a text encoder.
    """
    return replace(adapter, state=_renamed(adapter.state, nested), config=portable_config(adapter.config))


def for_encoder(adapter: AdapterFiles, encoder: nn.Module) -> AdapterFiles:
    """An adapter of a text encoder under the names that its layers have in this encoder.

    Args:
        adapter: Adapter of the text encoder.
        encoder: Text encoder of the base.
    """
    return normalized(adapter) if hasattr(encoder, "text_model") else _flat(adapter)


def for_class(adapter: AdapterFiles, kind: type[Any]) -> AdapterFiles:
    """The same for a class of text encoders.

    Args:
        adapter: Adapter of the text encoder.
        kind: Class of transformers.
    """
    return normalized(adapter) if _is_nested(kind) else _flat(adapter)


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose names of layers fit every version of transformers."""

    def short(name: str) -> str:
        return name.removeprefix("^").removeprefix(_MODEL)

    portable = dict(config)
    if isinstance(config.get("target_modules"), list):
        portable["target_modules"] = sorted(short(name) for name in config["target_modules"])
    for option in ("rank_pattern", "alpha_pattern"):
        if config.get(option):
            portable[option] = {short(name): value for name, value in config[option].items()}
    return portable


def _flat(adapter: AdapterFiles) -> AdapterFiles:
    state = _renamed(adapter.state, lambda name: name.removeprefix(_MODEL))
    return replace(adapter, state=state, config=portable_config(adapter.config))


def _renamed(state: Mapping[str, Tensor], named: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {PREFIX + named(key.removeprefix(PREFIX)): value for key, value in state.items()}
    if len(renamed) < len(state):
        raise UserError(f"the adapter of a text encoder has layers with and without {_MODEL} twice; export it again")
    return renamed


def _is_nested(kind: type[Any]) -> bool:
    """Whether a class has its layers below ``text_model``."""
    with torch.device("meta"):
        return hasattr(kind(kind.config_class(num_hidden_layers=1)), "text_model")
