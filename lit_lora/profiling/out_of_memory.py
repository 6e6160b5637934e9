"""Recognizes errors of exhausted memory."""

from __future__ import annotations

import torch

_MESSAGES = ("can't allocate memory", "not enough memory")
"""Messages of PyTorch's CPU allocator, which raises a plain RuntimeError."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or an error that caused it, reports that a device or the host has no memory left."""
    if error is None:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    refused = isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    return refused or is_out_of_memory(error.__cause__)
