"""Names of an adapter's layers and tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

PREFIX = "base_model.model."
"""Beginning of PEFT's names of an adapter's tensors in layers."""
SHARED_PREFIX = "base_model."
"""Beginning of PEFT's names of all tensors of an adapter; VeRA and others have some that all layers share."""


def tuner_layers(model: PeftModel, kind: type) -> list[tuple[str, Any]]:
    """Names and layers of one kind of PEFT's layers in an adapted model; names are those in the base.

    Args:
        model: Adapted model.
        kind: Class of the layers, such as ``peft.tuners.lora.LoraLayer``.
    """
    return [(name, layer) for name, layer in model.get_base_model().named_modules() if isinstance(layer, kind)]


def layer_of(key: str, config: Mapping[str, Any]) -> str:
    """Name of the layer of an adapter's tensor; empty for a tensor that layers share.

    Args:
        key: PEFT's name of the tensor, such as ``base_model.model.….to_q.ia3_l`` or ``base_model.vera_A``.
        config: Plain config of the adapter.
    """
    if not key.startswith(PREFIX):
        return ""
    own = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.get("peft_type"), "")
    found = re.match(rf"(.+?)\.{re.escape(own)}", key.removeprefix(PREFIX)) if own else None
    return found[1] if found else key.removeprefix(PREFIX).rpartition(".")[0]  # a layer that is trained in full
