"""Names of an adapter's layers and tensors."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

PREFIX = "base_model.model."
"""Beginning of PEFT's names of an adapter's tensors."""


def tuner_layers(model: PeftModel, kind: type) -> list[tuple[str, Any]]:
    """Names and layers of one kind of PEFT's layers in an adapted model; names are those in the base.

    Args:
        model: Adapted model.
        kind: Class of the layers, such as ``peft.tuners.lora.LoraLayer``.
    """
    return [(name, layer) for name, layer in model.get_base_model().named_modules() if isinstance(layer, kind)]
