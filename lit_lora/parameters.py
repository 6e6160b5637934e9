"""Trainable parameters of a module."""

from __future__ import annotations

from torch import nn


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
