"""Memory of tensors that are mapped from files."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_PAGEOUT = 21
"""Linux's MADV_PAGEOUT: what is still in the file is read again when it is needed; contents never change."""


def release(*tensors: Tensor) -> None:
    """Let the system take the memory of tensors that are mapped from a file and will not be read soon.

    safetensors maps files, whose pages otherwise count as memory of this process until all of the file's tensors are gone. Where
    the system cannot do it, nothing happens.

    Args:
        *tensors: Tensors on the CPU.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _PAGEOUT)
