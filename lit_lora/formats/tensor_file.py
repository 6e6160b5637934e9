"""Safetensors files with metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.files import check_readable, remedy
from lit_lora.mapped import release, to_bytes

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of dtypes."""


@dataclass(frozen=True)
class TensorFile:
    """The contents of a safetensors file.

    Args:
        path: Path of the file.
        tensors: Tensors by name.
        metadata: Metadata in the file's header.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read a file.

        Args:
            path: File to read.

        Raises:
            UserError: If the file is missing, not readable, incomplete or no safetensors file.
        """
        try:
            check_readable(path)
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
                return cls(path, tensors, opened.metadata() or {})
        except FileNotFoundError as error:
            raise UserError(
                f"{path} does not exist; name a safetensors file or a folder with one, or copy it again"
            ) from error
        except PermissionError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {remedy(error)}") from error
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {path}: {error}; an adapter is a safetensors file, or a folder with one: copy or export it again"
            ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, one tensor at a time; the same tensors and metadata give the same bytes.

    safetensors' own function needs all tensors in memory at once, none of which share any, and the metadata's order varies.

    Args:
        path: File to write.
        tensors: Tensors by name.
        metadata: Metadata for the file's header.

    Raises:
        OSError: If the disk is full or the file cannot be written.
    """
    # In the order of safetensors: each tensor begins at a multiple of its values' size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    begin = 0
    for name, tensor in ordered:
        place = [begin, begin + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        begin += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.unlink(missing_ok=True)  # tensors may be mapped from the old file
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(to_bytes(tensor))
            release(tensor)
