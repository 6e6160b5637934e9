"""Reads and writes safetensors files one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import reduce
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_lora.adapter_tools.lora_layer import narrowed
from lit_lora.errors import UserError
from lit_lora.files import check_readable
from lit_lora.mapped import to_bytes
from lit_lora.quantization.weight_change import Rounding

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STORED = {"F8_E4M3", "F8_E5M2", "I8", "U8"}
"""dtypes of quantized weights; integers beside these are buffers."""
_NO_FLOATS = "not a float: a quantized model cannot take an adapter; use the model in bfloat16, float16 or float32"
_CHUNK = 1 << 24

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


def shapes_in(files: Iterable[Path]) -> dict[Path, Shapes]:
    """The shapes of all tensors in safetensors files, whose headers alone are read.

    Args:
        files: The files.

    Raises:
        UserError: If a file is missing, incomplete or no safetensors file.
    """
    found = {}
    for file in files:
        try:
            check_readable(file)
            with safe_open(file, framework="pt") as opened:
                found[file] = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file}: {error}; copy or download it again") from error
    return found


def widest_dtype(files: Iterable[Path], model: object) -> torch.dtype:
    """The dtype that holds the values of all tensors in checked files.

    Args:
        files: The files.
        model: What they belong to, for errors.

    Raises:
        UserError: If a tensor is not a float, as in quantized models.
    """
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    if stored := sorted(names & _STORED):
        raise UserError(f"{model} has tensors of {stored[0]}, {_NO_FLOATS}")
    return reduce(torch.promote_types, [dtype for name, dtype in _DTYPES.items() if name in names])


def rewrite(source: Path, target: Path, changed: dict[str, Callable[[Tensor], Tensor]], rounding: Rounding) -> None:
    """Copy a safetensors file with other values in some tensors; dtypes, names and metadata stay.

    The memory needed is that of the largest changed tensor, three times in float32.

    Args:
        source: Checked file.
        target: File to write.
        changed: Functions that return the new value of a tensor, float32, from the old one, by the tensor's name.
        rounding: Where the rounding of the new values is counted.

    Raises:
        OSError: If the target cannot be written.
        UserError: If a tensor to change is not a float, as in quantized models, or a new value is beyond the dtype's range.
    """
    with source.open("rb") as read, target.open("wb") as write:
        size = read.read(8)
        header = read.read(int.from_bytes(size, "little"))
        write.write(size + header)
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if name not in changed:
                for start in range(begin, end, _CHUNK):
                    write.write(read.read(min(_CHUNK, end - start)))
                continue
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                raise UserError(f"{name} in {source} is {entry['dtype']}, {_NO_FLOATS}")
            data = bytearray(read.read(end - begin))
            assert len(data) == prod(entry["shape"]) * dtype.itemsize, "safe_open has checked the file"
            old = torch.frombuffer(data, dtype=dtype).view(entry["shape"])
            new = changed[name](old.float())
            written = narrowed(new, dtype, f"{name} in {source.name}")
            rounding.add(old, new, written)
            write.write(to_bytes(written))
