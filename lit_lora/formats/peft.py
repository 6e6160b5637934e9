"""The files in which PEFT saves an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lit_lora.adapters.names import SHARED_PREFIX
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats.base import AdapterFiles, AdapterFormat
from lit_lora.formats.own_metadata import file_metadata, foreign_metadata, own_entry, written_family
from lit_lora.formats.tensor_file import TensorFile, write_tensors
from lit_lora.formats.text_encoders import for_class, normalized

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class PeftFormat(AdapterFormat):
    """``adapter_model.safetensors`` and ``adapter_config.json``, for ``PeftModel.from_pretrained``.

    Adapters of text encoders are in subfolders with the encoders' names, under the names of layers that this version of
    transformers has.
    """

    name: ClassVar[str] = "peft"
    file_name: ClassVar[str] = WEIGHTS

    def why_not(self, adapter: AdapterFiles) -> str:
        if adapter.state:
            return ""
        alone = "is of text encoders" if adapter.parts else "has new tokens"
        return f"it needs an adapter of the denoiser, and this one {alone} alone"

    def write(self, adapter: AdapterFiles, folder: Path) -> None:
        _write_part(adapter.state, adapter.config, file_metadata(adapter), folder)
        for name, contents in adapter.text_encoders.items():
            (folder / name).mkdir(exist_ok=True)
            kind = None if adapter.family is None else adapter.family.encoder_classes.get(name)
            encoder = normalized(contents) if kind is None else for_class(contents, kind)
            _write_part(encoder.state, encoder.config, file_metadata(adapter), folder / name)

    def files(self, path: Path) -> list[Path]:
        return [path, *sorted(path.parent.glob(f"text_encoder*/{WEIGHTS}"))]

    def recognizes(self, file: TensorFile) -> bool:
        return bool(file.tensors) and all(name.startswith(SHARED_PREFIX) for name in file.tensors)

    def read(self, file: TensorFile, family: type[ModelFamily] | None = None) -> AdapterFiles:
        folder = file.path.parent
        entry = own_entry(file)
        encoders = {}
        for part in sorted(
            {path.parent for name in (WEIGHTS, CONFIG) for path in folder.glob(f"text_encoder*/{name}")}
        ):
            opened = TensorFile.open(part / WEIGHTS)  # a config without weights is an incomplete copy
            encoders[part.name] = normalized(AdapterFiles(opened.tensors, read_config(part)))
        return AdapterFiles(
            state=file.tensors,
            config=read_config(folder),
            metadata=foreign_metadata(file),
            family=family or written_family(entry),
            denoiser_config=entry.get("denoiser_config", {}),
            text_encoders=encoders,
        )


def _write_part(state: Mapping[str, Any], config: Mapping[str, Any], metadata: Mapping[str, str], folder: Path) -> None:
    write_tensors(folder / WEIGHTS, state, metadata)
    text = json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


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
