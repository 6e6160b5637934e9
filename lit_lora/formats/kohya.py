"""The file of kohya's sd-scripts, which A1111, Forge and ComfyUI read as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lit_lora.families import ModelFamily
from lit_lora.families.native_layers import NativeLayer
from lit_lora.formats.layer_file import LayerFile
from lit_lora.formats.layer_names import TENSOR, underscored
from lit_lora.formats.tensor_file import TensorFile

_PREFIXES = ("lora_unet_", "lora_te", "lora_transformer_")


class KohyaFormat(LayerFile):
    """``kohya.safetensors``: layers such as ``lora_unet_down_blocks_0_…`` with ``lora_down``, ``lora_up`` and ``alpha``."""

    name: ClassVar[str] = "kohya"
    file_name: ClassVar[str] = "kohya.safetensors"

    def layers(self, family: type[ModelFamily], config: Mapping[str, Any]) -> Iterator[tuple[str, NativeLayer]]:
        for layer in family.kohya_layers(config):
            yield f"lora_unet_{underscored(layer.name)}", layer

    def recognizes(self, file: TensorFile) -> bool:
        return bool(file.tensors) and all(
            name.startswith(_PREFIXES)
            and (found := TENSOR.fullmatch(name))
            and not found["tensor"].startswith(("hada", "lokr"))
            for name in file.tensors
        )
