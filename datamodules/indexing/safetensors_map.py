"""Tensors of a safetensors file as views of the mapped file, and such files with bytes that depend only on the tensors."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_HEADER_BYTES = 100_000_000
"""Maximum size of the header, which is also that of the library safetensors."""

_DTYPES = {"I64": np.int64, "I32": np.int32, "U8": np.uint8}


def write_tensors(file: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    The library safetensors writes to a file of its own beside ``file`` first, which remains if the process is killed, and orders
    the metadata by chance.

    Args:
        file: File to write.
        tensors: Contiguous arrays of the index's types; the file has those of larger elements first.
        metadata: Texts by name.
    """
    codes = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that all are aligned
    end = 0
    for name in names:
        array = tensors[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            opened.write(tensors[name].data)


def header_length(beginning: bytes) -> int:
    """Length of the header of a safetensors file, by the file's first 8 bytes.

    Raises:
        ValueError: If the file is shorter, or the length is above ``MAX_HEADER_BYTES``.
    """
    length = int.from_bytes(beginning, "little")
    if len(beginning) != 8 or length > MAX_HEADER_BYTES:
        raise ValueError(f"its header states {length} bytes, more than {MAX_HEADER_BYTES}")
    return length


def parse_header(data: bytes) -> dict[str, tuple[Any, int, int]]:
    """Type, begin and end of each tensor in the bytes after the header, and the metadata under ``__metadata__``.

    Raises:
        ValueError: If the header is damaged.
    """
    try:
        header = json.loads(data)
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
            raise ValueError("it has no metadata")
        tensors: dict[str, tuple[Any, int, int]] = {"__metadata__": (header.pop("__metadata__"), 0, 0)}
        for name, tensor in header.items():
            low, high = tensor["data_offsets"]
            if not (type(low) is type(high) is int and 0 <= low <= high):
                raise ValueError(f"its column {name[:20]!r} lies at {low} to {high}")
            tensors[name] = (_DTYPES[tensor["dtype"]], low, high)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error!r})") from error
    return tensors


def release_pages(array: NDArray[Any]) -> None:
    """Free the memory of a mapped file's pages that were read; later reads map them again. Other arrays are left alone.

    Args:
        array: Array from :func:`map_tensors`.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class MappedTensors(NamedTuple):
    """The tensors of a safetensors file, mapped into memory.

    Attributes:
        tensors: Arrays by name.
        offsets: Byte at which each of them begins in the file.
        metadata: Texts by name.
    """

    tensors: dict[str, NDArray[Any]]
    offsets: dict[str, int]
    metadata: dict[str, str]


def map_tensors(opened: BinaryIO) -> MappedTensors:
    """Map the tensors of a safetensors file into memory.

    The library safetensors cannot view part of a tensor as an array without copying it.

    Args:
        opened: The file, which may be closed afterwards.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged.
    """
    length = header_length(opened.read(8))
    header = opened.read(length)
    if len(header) < length:
        raise ValueError("it is truncated within its header")
    found = parse_header(header)
    data = np.asarray(np.memmap(opened, np.uint8, "r", offset=8 + length))
    end = max(high for _, _, high in found.values())
    if end < len(data):
        raise ValueError(f"{len(data) - end} bytes follow its columns")
    metadata, _, _ = found.pop("__metadata__")
    tensors = {}
    for name, (dtype, low, high) in found.items():
        if high > len(data):
            raise ValueError(f"it is truncated: {name[:20]!r} ends at byte {8 + length + high}")
        tensors[name] = data[low:high].view(dtype)
    return MappedTensors(tensors, {name: 8 + length + low for name, (_, low, _) in found.items()}, dict(metadata))
