"""Names of a CLIP text encoder's layers, which differ between versions of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.lora import PREFIX

_MODEL = "text_model."


def nested(layer: str) -> str:
    """The name of a layer of CLIP below ``text_model``, as older versions of transformers and other tools have it."""
    return _MODEL + layer if layer.startswith("encoder.layers.") else layer


def for_encoder(adapter: AdapterFiles, encoder: nn.Module) -> AdapterFiles:
    """An adapter of a text encoder under the names that its layers have in this encoder.

    Since transformers 5 the layers of ``CLIPTextModel`` are no longer below ``text_model``.

    Args:
        adapter: Adapter of the text encoder.
        encoder: Text encoder of the base.
    """
    is_nested = hasattr(encoder, "text_model")

    def named(layer: str) -> str:
        start = "^" if layer.startswith("^") else ""
        plain = layer.removeprefix("^")
        return start + (nested(plain) if is_nested else plain.removeprefix(_MODEL))

    state = {PREFIX + named(key.removeprefix(PREFIX)): value for key, value in adapter.state.items()}
    return replace(adapter, state=state, config=_renamed(adapter.config, named))


def _renamed(config: Mapping[str, Any], named: Any) -> dict[str, Any]:
    renamed = dict(config)
    targets = config.get("target_modules")
    if isinstance(targets, list):
        renamed["target_modules"] = [named(target) for target in targets]
    for option in ("rank_pattern", "alpha_pattern"):
        renamed[option] = {named(pattern): value for pattern, value in (config.get(option) or {}).items()}
    return renamed
