"""Loading text encoders with quantized frozen weights, weight by weight, through transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lit_lora.errors import UserError
from lit_lora.freed_memory import given_back
from lit_lora.quantization.base import Quantization
from lit_lora.quantization.dense import Dense
from lit_lora.quantization.frozen_layer import can_freeze, freeze_layer, put_stored
from lit_lora.quantization.weight_change import Changes, apply_changes

_METHOD = "lit_lora"
"""Name of the quantization in transformers."""


def load_encoder(
    kind: Any,
    source: str,
    folder: str,
    dtype: torch.dtype,
    *,
    quantization: Quantization | None = None,
    name: str = "text_encoder",
    changes: Changes | None = None,
    load: Callable[..., nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """Load a model of transformers, whose Linear and Conv2d weights are quantized one by one while they are read.

    transformers reads and renames the weights; the model never exists in the precision of its files.

    Args:
        kind: Class of the model.
        source: Local folder or hub id.
        folder: Subfolder of the model.
        dtype: dtype of all other weights.
        quantization: Quantization of the weights; defaults to none.
        name: Name of the model in the pipeline, with which the patterns of ``quantization.skip`` begin.
        changes: Changes of weights before they are quantized; defaults to none.
        load: Function from class, source, subfolder, dtype and options to the model in full precision, which is then quantized;
            defaults to the class's ``from_pretrained``, which needs less memory.
        **options: Options of ``from_pretrained``.

    Raises:
        UserError: If the files hold quantized weights already, or the model lacks weights to change.
    """
    changes = dict(changes or {})
    if quantization is None or isinstance(quantization, Dense) or load is not None:
        make = load or _from_pretrained
        model = make(kind, source, folder, dtype, **options)
        apply_changes(model, changes)
        if quantization is not None:
            _quantize_loaded(model, quantization, name)
        return model
    revision = {"revision": options["revision"]} if "revision" in options else {}
    if (
        getattr(AutoConfig.from_pretrained(source, subfolder=folder, **revision), "quantization_config", None)
        is not None
    ):
        raise UserError(
            f"{name} of {source} is quantized already; leave model.memory.text_encoder_quantization out, or take files in "
            f"full precision"
        )
    config = _quantizing()(quantization, name, changes)
    # Given back are the full weights, each of which is freed before the next is read. transformers draws first values for layers
    # that are quantized already, which changes no weight, but what is drawn later.
    with given_back(), torch.random.fork_rng([]):
        model = _from_pretrained(kind, source, folder, dtype, quantization_config=config, **options)
    apply_changes(model, changes)  # those of weights that are not quantized
    return model


def shape_encoder(model: nn.Module, quantization: Quantization | None, name: str) -> nn.Module:
    """Quantize a loaded text encoder, or one of meaningless values; see :func:`load_encoder`."""
    if quantization is not None:
        _quantize_loaded(model, quantization, name)
    return model


def put_encoder_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], quantization: Quantization, dtype: torch.dtype
) -> set[str]:
    """Put quantized weights that another process read into a text encoder.

    Args:
        model: The text encoder on the meta device.
        tensors: All tensors of the other process's model by name.
        quantization: Quantization that made them.
        dtype: dtype of the model's other weights.

    Returns:
        Names of the tensors that were put.
    """
    put: set[str] = set()
    for path, layer in list(model.named_modules()):
        if can_freeze(layer) and f"{path}.weight" not in tensors:
            stored = {key.rpartition(".")[2]: key for key in tensors if key.startswith(f"{path}.weight_")}
            shape, own = layer.get_parameter("weight").shape, _own_dtype(model, path, dtype)
            put_stored(layer, quantization, {key: tensors[one] for key, one in stored.items()}, shape, own)
            put |= set(stored.values())
    return put


def _from_pretrained(kind: Any, source: str, folder: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    model: nn.Module = kind.from_pretrained(source, subfolder=folder, dtype=dtype, **options)
    return model


def _quantize_loaded(model: nn.Module, quantization: Quantization, name: str) -> None:
    for path, layer in list(model.named_modules()):
        if can_freeze(layer) and _takes(quantization, name, path):
            weight = layer.get_parameter("weight").detach()
            freeze_layer(layer, quantization, weight, weight.dtype)


def _takes(quantization: Quantization, name: str, path: str) -> bool:
    return not isinstance(quantization, Dense) and quantization.takes(f"{name}.{path}")


def _own_dtype(model: nn.Module, path: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which transformers keeps a layer; some overflow in float16."""
    exact: Any = getattr(model, "_keep_in_fp32_modules", None) if dtype == torch.float16 else None
    return torch.float32 if any(part in path.split(".") for part in exact or ()) else dtype


@cache
def _quantizing() -> Any:
    """A class of configs with which ``from_pretrained`` quantizes; made once, when transformers is told of it."""

    @register_quantization_config(_METHOD)
    class Config(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
        def __init__(self, quantization: Quantization, name: str, changes: dict[str, Any]) -> None:
            self.quant_method: Any = _METHOD
            self.quantization, self.name, self.changes = quantization, name, changes

    @register_quantizer(_METHOD)
    class Quantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
        quantization_config: Any

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            path, _, attribute = param_name.rpartition(".")
            own = self.quantization_config
            return (
                attribute == "weight"
                and can_freeze(model.get_submodule(path))
                and _takes(own.quantization, own.name, path)
            )

        def get_quantize_ops(self) -> ConversionOps:
            return _Quantize(self.quantization_config)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            # From here on the model is one like others to transformers, which would refuse to move or cast it.
            self.remove_quantization_config(model)
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    return Config


class _Quantize(ConversionOps):  # type: ignore[misc, unused-ignore]
    """Quantizes one weight and puts it into its layer, instead of transformers."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def convert(  # type: ignore[override, unused-ignore]
        self,
        input_dict: dict[str, Any],
        *,
        model: Any,
        full_layer_name: str,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        ((_, value),) = input_dict.items()
        weight: Tensor = value[0] if isinstance(value, list) else value
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        if weight.shape != layer.weight.shape:
            return {full_layer_name: weight}  # transformers reports it
        change = self.config.changes.pop(full_layer_name, None)
        dtype = weight.dtype
        freeze_layer(layer, self.config.quantization, weight if change is None else change.applied(weight), dtype)
        for stored in layer.stored_names:
            layer._parameters[stored]._is_hf_initialized = True
        missing_keys.discard(full_layer_name)
        return {}
