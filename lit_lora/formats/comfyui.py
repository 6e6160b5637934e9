"""The file with ComfyUI's own names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lit_lora.families import ModelFamily
from lit_lora.families.native_layers import NativeLayer
from lit_lora.formats.layer_file import LayerFile
from lit_lora.formats.layer_names import TENSOR
from lit_lora.formats.tensor_file import TensorFile

_PREFIX = "diffusion_model."


class ComfyUIFormat(LayerFile):
    """``comfyui.safetensors``: layers such as ``diffusion_model.double_blocks.0.img_attn.qkv``, named as in the model's weights.

    Layers of text encoders have kohya's names, which ComfyUI reads for every family.
    """

    name: ClassVar[str] = "comfyui"
    file_name: ClassVar[str] = "comfyui.safetensors"

    def layers(self, family: type[ModelFamily], config: Mapping[str, Any]) -> Iterator[tuple[str, NativeLayer]]:
        for layer in family.native_layers(config):
            yield _PREFIX + layer.name, layer

    def recognizes(self, file: TensorFile) -> bool:
        names = list(file.tensors)
        ours = any(name.startswith((_PREFIX, "text_encoders.")) for name in names)
        return ours and all(
            name.startswith((_PREFIX, "text_encoders.", "lora_te")) and TENSOR.fullmatch(name) for name in names
        )
