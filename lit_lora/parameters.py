"""Parameters of a module."""

from __future__ import annotations

from torch import nn


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; shared ones count once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
