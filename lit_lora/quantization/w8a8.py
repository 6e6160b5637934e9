"""8-bit integer weights whose products with 8-bit inputs are computed in integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_lora.quantization.base import Stored
from lit_lora.quantization.int8 import Int8


class W8A8(Int8):
    """Weights of :class:`Int8` that Linear layers multiply in 8-bit integers instead of restoring them.

    In the forward pass each row of the input, one per token, is rounded to 8 bits with a scale of its own. The sums of the
    products are exact, and are scaled back: ``Y = scale_x * scale_w * (X8 W8^T)``. In the backward pass the rows of the gradient,
    scaled by ``scale_w``, are rounded in the same way. The error of a number is at most 1/254 of the largest in its row.

    It takes as much memory as :class:`Int8`, and less time where integers multiply faster: see ``benchmarks/speed.py``.
    Convolutions, and Linear layers whose sizes the device's kernel does not take, restore their weights as ``Int8`` does.

    Args:
        skip: Glob patterns of further layers that stay in ``base_dtype``, such as ``mid_block.*``; none by default.
    """

    def product(self, rows: Tensor, stored: Stored, shape: torch.Size, bias: Tensor | None = None) -> Tensor:
        if not _multiplies(rows, shape[1], shape[0]):
            return super().product(rows, stored, shape, bias)
        output: Tensor = _Product.apply(rows, stored["weight_data"], stored["weight_scale"])
        return output if bias is None else output + bias

    def gradient_product(self, grad: Tensor, stored: Stored, shape: torch.Size) -> Tensor:
        if not _multiplies(grad, shape[0], shape[1]):
            return super().gradient_product(grad, stored, shape)
        return _gradient(grad, stored["weight_data"], stored["weight_scale"])


class _Product(torch.autograd.Function):
    """The forward product; its backward pass serves compiled blocks, where no other function surrounds it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(data, scale)
        return _scaled(rows, data.T, scale.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        data, scale = ctx.saved_tensors
        return _gradient(grad, data, scale), None, None


def _gradient(grad: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    return _scaled(grad * scale.T, data, None).to(grad.dtype)


def _scaled(rows: Tensor, data: Tensor, scale: Tensor | None) -> Tensor:
    """``rows @ data * scale``, with each row rounded to 8 bits. A row with NaN or Inf gives a row of NaN."""
    largest = rows.abs().amax(dim=1, keepdim=True).float()
    steps = largest.clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
    rounded = (rows / steps).round_().to(torch.int8)
    product = torch._int_mm(rounded, data).float().mul_(steps)
    return (product if scale is None else product.mul_(scale)).to(rows.dtype)


def _multiplies(rows: Tensor, inner: int, outer: int) -> bool:
    """Whether the device's kernel takes ``(n, inner) @ (inner, outer)``: CUDA's wants more than 16 rows and multiples of 8."""
    return not rows.is_cuda or (len(rows) > 16 and inner % 8 == 0 and outer % 8 == 0)
