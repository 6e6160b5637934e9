"""The files in which PEFT saves an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.formats.base import AdapterFiles, AdapterFormat

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class PeftFormat(AdapterFormat):
    """``adapter_model.safetensors`` and ``adapter_config.json``, for ``PeftModel.from_pretrained``."""

    def holds(self, config: PeftConfig, pipeline_class: type[DiffusionPipeline]) -> bool:
        return True

    def write(
        self, adapter: AdapterFiles, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str
    ) -> None:
        save_file(_apart(adapter.state), folder / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps({**adapter.config, "inference_mode": True}, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")

    def read(self, folder: Path, pipeline_class: type[DiffusionPipeline], denoiser_name: str) -> AdapterFiles:
        return AdapterFiles(read_tensors(folder / WEIGHTS), read_config(folder))


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors needs them and as PEFT writes them; layers of RandLora share theirs."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Args:
        folder: Folder of the adapter.

    Raises:
        UserError: If the file is missing or does not hold a JSON object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not an adapter folder: cannot read {path.name} ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder} is not an adapter folder: {path.name} does not hold a JSON object")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Args:
        path: File to read.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def safetensors_bytes(state: Mapping[str, Tensor]) -> int:
    """Size in bytes of a safetensors file of float32 tensors: length of the header, header, tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(state.items()):
        end = offset + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + offset
