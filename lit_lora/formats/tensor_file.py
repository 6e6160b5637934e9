"""Safetensors files with metadata."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.files import check_regular


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
            UserError: If the file is missing, incomplete or no safetensors file.
        """
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
                return cls(path, tensors, opened.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {path}: {error}; an adapter is a safetensors file, or a folder with one: copy or export it again"
            ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the same tensors and metadata give the same bytes.

    Args:
        path: File to write.
        tensors: Tensors by name, which may share memory.
        metadata: Metadata for the file's header.

    Raises:
        OSError: If the disk is full or the file cannot be written.
    """
    try:
        save_file(_apart(tensors), path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    _sort_metadata(path)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors needs them; layers of RandLora share theirs."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        memory = tensor.untyped_storage().data_ptr()
        partial = tensor.untyped_storage().nbytes() != tensor.nbytes
        apart[name] = tensor.clone() if partial or memory in seen else tensor
        seen.add(memory)
    return apart


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
