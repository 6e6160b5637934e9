"""Tensors whose memory is that of files."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from torch import Tensor

from lit_lora.files import writable_folder

Keep = Callable[[Tensor], Tensor]
"""Puts a new tensor where it stays, as :func:`keep_on_disk` does, and returns it from there."""

_PAGEOUT = 21
"""Linux's MADV_PAGEOUT, which Python does not name: pages leave the memory, and values never change."""
SMALL = 64 << 10
"""Largest tensor, in bytes, that is left in memory, where those of a small adapter have room."""


def release(*tensors: Tensor) -> None:
    """Let the system take the memory of tensors that are mapped from a file and will not be read soon.

    safetensors maps files, whose pages otherwise count as memory of this process until all of the file's tensors are gone. Memory
    that torch has allocated, and systems that cannot do it, are left alone.

    Args:
        *tensors: Any tensors, whose values stay.
    """
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or storage.resizable():  # torch's own
            continue
        # Shared mappings, which have their file's name, lose their pages at once by MADV_DONTNEED, also while the system writes
        # them to the disk: the values are the file's. In safetensors' private mappings it would undo changes of values.
        _advise(tensor, mmap.MADV_DONTNEED if storage.filename else _PAGEOUT)


def _advise(tensor: Tensor, advice: int) -> None:
    """Tell Linux how the whole pages of a tensor's memory will be used."""
    if not sys.platform.startswith("linux"):
        return
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


def keep_in_memory(tensor: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return tensor


def keep_on_disk(folder: Path) -> Keep:
    """A function that returns small tensors as they are, and others as copies that are mapped from temporary files.

    The files have no name once they are mapped, so that nothing is left of them when their tensors are gone.

    Args:
        folder: Folder for the files, which is created if it is missing. The function raises OSError if its disk is full.

    Raises:
        UserError: If the folder cannot be created or written.
    """
    writable_folder(folder)

    def keep(tensor: Tensor) -> Tensor:
        if tensor.nbytes <= SMALL:
            return tensor
        with file_of(tensor, folder) as file:
            try:
                return map_file(file, tensor.shape, tensor.dtype)
            except RuntimeError:  # torch cannot map it, as on network file systems without shared mappings
                return tensor

    return keep


@contextmanager
def file_of(tensor: Tensor, folder: Path) -> Iterator[Path]:
    """Yield a temporary file with the values of a tensor; it loses its name when the block ends, and stays while it is mapped.

    Raises:
        OSError: If the disk is full.
    """
    with NamedTemporaryFile(dir=folder, prefix=".lit-lora-", buffering=0) as file:
        data = to_bytes(tensor)
        try:
            # Written, not copied into the mapping, where a full disk would end the process.
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            error.filename = str(folder)
            raise
        yield Path(file.name)


def map_file(file: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is that of a file; processes that map the same file share it.

    Raises:
        RuntimeError: If the file system cannot map files for several processes.
    """
    values = torch.from_file(str(file), shared=True, size=shape.numel() * dtype.itemsize, dtype=torch.uint8)
    return values.view(dtype).view(shape)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is that of a file which :func:`map_file` has mapped."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def read_ahead(*tensors: Tensor) -> None:
    """Let the system begin to read the files of mapped tensors; other tensors, and systems that cannot do it, are left alone.

    Args:
        *tensors: Any tensors.
    """
    for tensor in tensors:
        if is_mapped(tensor):
            _advise(tensor, mmap.MADV_WILLNEED)


def to_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor in their order; those of a contiguous tensor on the CPU are not copied."""
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    # By numpy() torch would not resize the tensor's memory any more, which FSDP does with that of parameters.
    data: memoryview = np.from_dlpack(values).data
    return data
