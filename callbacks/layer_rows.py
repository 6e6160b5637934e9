"""Inputs and outputs of Linear and Conv2d layers as the rows of matrices, so that both compute ``Y = X W^T``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs of each output of a layer, ``(rows, in)``; of a convolution the patches, ``(rows, C * height * width)``.

    Args:
        layer: Linear layer, or Conv2d layer without groups.
        x: Input of the layer, ``(..., in)`` or ``(B, C, H, W)``.
    """
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        if isinstance(padding, str):
            x, padding = nn.functional.pad(x, layer._reversed_padding_repeated_twice), 0
        unfolded: Tensor = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
        x = unfolded.transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """The outputs of a layer, ``(rows, out)``, in the order of :func:`input_rows`.

    Args:
        layer: Linear layer, or Conv2d layer without groups.
        y: Output of the layer, ``(..., out)`` or ``(B, out, H', W')``.
    """
    if isinstance(layer, nn.Conv2d):
        y = y.flatten(2).transpose(1, 2)
    return y.reshape(-1, y.shape[-1])
