"""The LoRA file of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, PeftConfig
from safetensors import safe_open

from lit_lora.errors import UserError
from lit_lora.formats.base import AdapterFiles, AdapterFormat
from lit_lora.formats.peft import read_tensors

_PREFIX = "base_model.model."
_METADATA = "lora_adapter_metadata"


class DiffusersFormat(AdapterFormat):
    """``pytorch_lora_weights.safetensors`` with the config in its metadata, for ``load_lora_weights`` of the pipeline."""

    def holds(self, config: PeftConfig, pipeline_class: type[DiffusionPipeline]) -> bool:
        """Whether it is LoRA or DoRA, without trained biases or ``modules_to_save``, for a pipeline with LoRA files."""
        plain = type(config) is LoraConfig and config.bias == "none" and not config.modules_to_save
        return plain and hasattr(pipeline_class, "save_lora_weights")

    def write(
        self, adapter: AdapterFiles, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str
    ) -> None:
        layers = {key.removeprefix(_PREFIX): value for key, value in adapter.state.items()}
        options = {
            f"{denoiser_name}_lora_layers": layers,
            f"{denoiser_name}_lora_adapter_metadata": dict(adapter.config),
        }
        pipeline_class.save_lora_weights(folder, **options)
        _sort_metadata(folder / LORA_WEIGHT_NAME_SAFE)

    def read(self, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str) -> AdapterFiles:
        path = folder / LORA_WEIGHT_NAME_SAFE
        tensors = read_tensors(path)
        with safe_open(path, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
        prefix = f"{denoiser_name}."
        config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        state = {_PREFIX + key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not state or not config:
            raise UserError(f"{path} does not hold an adapter of a {denoiser_name} and its config")
        return AdapterFiles(state, config)


def _sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, whose order varies, so that the same adapter gives the same bytes."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "the header must not grow, because the tensors follow it"
        opened.seek(8)
        opened.write(text.ljust(size))
