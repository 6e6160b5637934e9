"""The names that other tools give to the layers of a model family's denoiser and text encoders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import T5EncoderModel

from lit_lora.families import ModelFamily
from lit_lora.families.native_layers import NativeLayer

TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?P<tensor>lora_(down|up|mid|A|B)\.weight|alpha|dora_scale|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2))"
)
"""Names of tensors in files that hold one group of tensors for each layer."""

_CLIP_BLOCK = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_T5_BLOCK = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
)
_COMFY_ENCODERS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}


@dataclass(frozen=True)
class Place:
    """Where a layer of a file belongs.

    Args:
        part: ``denoiser``, or the name of a text encoder.
        layer: The layer; that of a text encoder has one part.
    """

    part: str
    layer: NativeLayer


def underscored(name: str) -> str:
    """A layer's name as kohya's scripts write it."""
    return name.replace(".", "_")


def places(family: type[ModelFamily], config: Mapping[str, Any]) -> dict[str, Place]:
    """All names of a family's layers, in the files of any tool, and the layers that they mean.

    kohya's scripts, A1111, ComfyUI, OneTrainer, SimpleTuner and LyCORIS are covered.

    Args:
        family: Model family.
        config: Config of the denoiser, as :meth:`ModelFamily.native_layers` takes it.
    """
    found: dict[str, Place] = {}
    for native in family.native_layers(config):
        place = Place("denoiser", native)
        found[f"diffusion_model.{native.name}"] = place
        found[f"lora_unet_{underscored(native.name)}"] = place
        for part in native.parts:
            single = Place("denoiser", NativeLayer(part, (part,)))
            for prefix in ("lora_unet_", "lora_transformer_", "lycoris_"):
                found.setdefault(prefix + underscored(part), single)
    for encoder, prefix in family.kohya_encoders.items():
        for layer in encoder_layers(family, encoder):
            place = Place(encoder, NativeLayer(layer, (layer,)))
            for name in {prefix, prefix.replace("lora_te", "lora_te1") if prefix == "lora_te" else prefix}:
                found[f"{name}_{underscored(layer)}"] = place
            for tower in ("t5xxl",) if _is_t5(family, encoder) else _COMFY_ENCODERS.get(encoder, ()):
                found[f"text_encoders.{tower}.transformer.{layer}"] = place
    return found


def encoder_layers(family: type[ModelFamily], encoder: str) -> Iterator[str]:
    """Names of the layers of a text encoder that may be adapted, in every version of CLIP or T5.

    Args:
        family: Model family.
        encoder: Name of one of its text encoders.
    """
    if _is_t5(family, encoder):
        yield from (f"encoder.block.{i}.{name}" for i in range(24) for name in _T5_BLOCK)
    else:
        yield "text_projection"
        yield from (f"text_model.encoder.layers.{i}.{name}" for i in range(32) for name in _CLIP_BLOCK)


def _is_t5(family: type[ModelFamily], encoder: str) -> bool:
    return issubclass(family.encoder_classes[encoder], T5EncoderModel)
