"""Weights that a model's files hold quantized by bitsandbytes or torchao, as ``save_pretrained`` writes them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_lora.errors import UserError

_EXTRAS = {"bitsandbytes": "quant", "torchao": "torchao"}
"""Methods that are read, each with the extra that installs its package."""

_STATE = ".quant_state.bitsandbytes__"


class SavedQuantized(NamedTuple):
    """A quantized weight in a file: the tensors that it consists of, and how it is restored."""

    parts: tuple[str, ...]
    """Names of the tensors in the file."""
    restore: Callable[[Mapping[str, Tensor]], Tensor]
    """Function from these tensors, by their names, to the weight."""


def saved_method(config: Mapping[str, Any], where: str) -> str | None:
    """Method by which a model's weights were quantized when it was saved; None if they were not.

    Args:
        config: Contents of the model's ``config.json``.
        where: The model, for the error.

    Raises:
        UserError: If weights of this method cannot be read, or its package is not installed.
    """
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is None:
        return None
    if method not in _EXTRAS:
        raise UserError(
            f"the weights of {where} were quantized by {method} when they were saved, and only those of "
            f"{' and '.join(_EXTRAS)} can be read; name the model in bf16 or fp16, and set quantization"
        )
    try:
        importlib.import_module(method)
    except ImportError as error:
        raise UserError(
            f"the weights of {where} were quantized by {method}, which restores them: pip install "
            f'"lit_lora[{_EXTRAS[method]}]", or name the model in bf16 or fp16'
        ) from error
    return str(method)


def saved_quantized(names: Collection[str], metadata: Mapping[str, str]) -> dict[str, SavedQuantized]:
    """The quantized weights among the tensors of a model's files, by the names of the weights.

    Args:
        names: Names of all tensors.
        metadata: Metadata of all files.
    """
    found = {}
    for name in names:
        if _STATE in name:
            weight = name.partition(_STATE)[0]
            parts = (weight, *(one for one in names if one.startswith(f"{weight}.")))
            found[weight] = SavedQuantized(parts, _four_bit(weight))
        elif name.endswith(".SCB"):
            layer = name.removesuffix(".SCB")
            weight = f"{layer}.weight"
            parts = tuple(one for one in (weight, name, f"{layer}.weight_format") if one in names)
            found[weight] = SavedQuantized(parts, _eight_bit(layer))
    for weight in json.loads(metadata.get("tensor_names", "[]")):
        if json.loads(metadata[weight])["_type"] != "Tensor":
            layer, _, attribute = weight.rpartition(".")
            parts = tuple(one for one in names if one.startswith(f"{layer}._{attribute}_"))
            found[weight] = SavedQuantized(parts, _torchao(weight, metadata[weight]))
    return found


def _four_bit(weight: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def restore(tensors: Mapping[str, Tensor]) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = {name: tensor for name, tensor in tensors.items() if name != weight}
        restored: Tensor = dequantize_4bit(tensors[weight], QuantState.from_dict(state, device=torch.device("cpu")))
        return restored

    return restore


def _eight_bit(layer: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def restore(tensors: Mapping[str, Tensor]) -> Tensor:
        layout = int(tensors.get(f"{layer}.weight_format", torch.zeros(())))
        if layout != 0:
            raise UserError(
                f"{layer}.weight has layout {layout} of bitsandbytes' 8-bit weights, not 0, rows; save the model again with a "
                f"present version of bitsandbytes, or name it in bf16 or fp16"
            )
        # As bitsandbytes' int8_vectorwise_dequant: the largest number of a row is stored as 127.
        return tensors[f"{layer}.weight"].float() * (tensors[f"{layer}.SCB"].float()[:, None] / 127)

    return restore


def _torchao(weight: str, kind: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def restore(tensors: Mapping[str, Tensor]) -> Tensor:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        made, _ = unflatten_tensor_state_dict(dict(tensors), {weight: kind, "tensor_names": json.dumps([weight])})
        restored: Tensor = made[weight].dequantize()
        return restored

    return restore
