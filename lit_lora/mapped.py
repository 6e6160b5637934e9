"""Tensors whose memory is that of files."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
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
_SMALL = 64 << 10
"""Largest tensor that :func:`keep_on_disk` leaves in memory, where those of a small adapter have room."""


def release(*tensors: Tensor) -> None:
    """Let the system take the memory of tensors that are mapped from a file and will not be read soon.

    safetensors maps files, whose pages otherwise count as memory of this process until all of the file's tensors are gone. Memory
    that torch has allocated, and systems that cannot do it, are left alone.

    Args:
        *tensors: Any tensors, whose values stay.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or storage.resizable():  # torch's own
            continue
        start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - start
        # Shared mappings, which have their file's name, lose their pages at once by MADV_DONTNEED, also while the system writes
        # them to the disk: the values are the file's. In safetensors' private mappings it would undo changes of values.
        advice = mmap.MADV_DONTNEED if storage.filename else _PAGEOUT
        if size > 0:
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


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
        if tensor.nbytes <= _SMALL:
            return tensor
        try:
            with NamedTemporaryFile(dir=folder, prefix=".lit-lora-") as file:
                # Written, not copied into the mapping, where a full disk would end the process.
                file.write(to_bytes(tensor))
                file.flush()
                mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except RuntimeError:  # torch cannot map it, as on network file systems without shared mappings
            return tensor
        except OSError as error:
            error.filename = str(folder)
            raise
        return mapped.view(tensor.shape)

    return keep


def to_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor in their order; those of a contiguous tensor on the CPU are not copied."""
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    # By numpy() torch would not resize the tensor's memory any more, which FSDP does with that of parameters.
    data: memoryview = np.from_dlpack(values).data
    return data
