"""Copies to the GPU for which the CPU does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device.

    A copy from ordinary memory would wait until the GPU has done all that it has been given, so that nothing is queued when it
    ends. From page-locked memory the copy takes its turn on the GPU, and the CPU goes on.

    Args:
        values: Tensor on the CPU, or on the device already.
        device: Where it is needed.
    """
    if device.type == "cuda" and not values.is_cuda:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
