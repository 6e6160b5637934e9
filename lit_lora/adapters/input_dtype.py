"""Adapters that take their inputs as they come."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn


def keep_input_dtype(model: nn.Module) -> None:
    """Let LoRA layers leave the dtype of their inputs to autocast.

    PEFT casts a layer's bfloat16 input to the adapter's float32, and autocast casts it back for the product, so that each layer
    keeps a copy of its own for the backward pass. Without the first cast the product takes the input itself. The values are the
    same bit for bit; dropout, whose random numbers depend on the dtype, draws others. Layers of LoRA's variants, such as DoRA,
    stay as they are, because they compute with the base's weight in the dtype of their input.

    Args:
        model: Model with an adapter, which is used under autocast or has weights and inputs of one dtype.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_variant:
            layer.cast_input_dtype_enabled = False
