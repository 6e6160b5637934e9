"""Reads GGUF files, in which ComfyUI's users keep quantized denoisers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_lora.errors import UserError


def open_gguf(path: Path) -> tuple[Callable[[str], Tensor], dict[str, Tensor]]:
    """A function that dequantizes a tensor by its name, float32, and all tensors on the meta device.

    The file is mapped, and each tensor is dequantized by the package ``gguf`` when it is asked for.

    Args:
        path: The file.

    Raises:
        UserError: If the package is not installed, or the file is damaged or has a type that the package does not dequantize.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError(
            f'{path} is a GGUF file, which the package gguf reads; pip install "lit_lora[gguf]", or take the .safetensors file'
        ) from error
    try:
        reader: Any = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise UserError(f"{path} is no GGUF file, or damaged ({error})") from error
    found = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: _shape(reader, name, tensor) for name, tensor in found.items()}

    def read(name: str) -> Tensor:
        tensor = found[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{path} stores {name} as {tensor.tensor_type.name}, which the package gguf does not dequantize; take a file of "
                f"another type, such as Q8_0"
            ) from error
        # What is stored as float32 is a view of the mapped file.
        own = values if values.flags.writeable else values.copy()
        return torch.from_numpy(own).reshape(shapes[name]).float()

    return read, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _shape(reader: Any, name: str, tensor: Any) -> list[int]:
    """Shape in torch's order; ComfyUI's converter notes that of tensors with more dimensions than GGUF has."""
    original = reader.get_field(f"comfy.gguf.orig_shape.{name}")
    if original is not None:
        return [int(original.parts[index][0]) for index in original.data]
    return [int(size) for size in reversed(tensor.shape)]
