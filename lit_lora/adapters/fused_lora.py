"""LoRA and its frozen layer in one step of the backward graph."""

from __future__ import annotations

import threading
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_lora.quantization.frozen_layer import FrozenLinear, computing_dtype


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA of a frozen Linear layer, ``Y = X W^T + b + s (X A^T) B^T``, with fewer operations.

    PEFT computes the base's output and LoRA's in turn, scales one and adds it to the other, and autograd does the same with their
    gradients. Here the products add to each other's results, and ``s`` scales ``X A^T``, which has ``r`` columns. Only the input
    and ``X A^T`` are kept for the backward pass. In bfloat16 the sum is rounded once instead of three times.

    Calls that need more than this, such as with dropout, hooks in the layer, several adapters or a compiler, are PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0]
        if args or kwargs or x.ndim < 2 or not self._is_plain(name):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        output: Tensor = _Fused.apply(x, a, b, self.scaling[name], self.base_layer)
        return output

    def _is_plain(self, name: str) -> bool:
        """Whether the call is that of one LoRA with nothing else in the layer."""
        if self.disable_adapters or self.merged or len(self.active_adapters) > 1 or name not in self.lora_A:
            return False
        if torch.compiler.is_compiling() or name in self.lora_variant or self.lora_bias[name]:
            return False
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return False
        layers = (self.base_layer, self.lora_A[name], self.lora_B[name])
        return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


class _Casts(threading.local):
    """The last cast input, which the queries, keys and values of an attention layer share."""

    def __init__(self) -> None:
        self._input: ReferenceType[Tensor] | None = None
        self._cast: ReferenceType[Tensor] | None = None
        self._version = 0

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` as rows in the dtype; the same tensor as in the last call if that was with ``x`` and something still uses it."""
        if x.dtype == dtype or x.is_inference():
            return x.reshape(-1, x.shape[-1]).to(dtype)
        cast = None
        if self._input is not None and self._cast is not None and self._input() is x and self._version == x._version:
            cast = self._cast()
        if cast is None or cast.dtype != dtype:
            cast = x.reshape(-1, x.shape[-1]).to(dtype)
            self._input, self._cast, self._version = ref(x), ref(cast), x._version
        return cast


_casts = _Casts()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, layer: nn.Linear) -> Tensor:
        dtype = computing_dtype(x)
        rows, a, b = _casts.rows(x, dtype), a.to(dtype), b.to(dtype)
        bias = layer.bias if layer.bias is None else layer.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.linear(rows, a)
            output = _product(layer, rows, bias).addmm_(hidden, b.T, alpha=scaling)
        ctx.save_for_backward(rows, a, b, hidden)
        ctx.scaling, ctx.layer, ctx.shape = scaling, layer, x.shape
        # A view as output would forbid in-place additions to it.
        result: Tensor = torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows, a, b, hidden = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        for_x = for_a = for_b = None
        with torch.autocast(grad.device.type, enabled=False):
            for_hidden = (grad @ b).mul_(ctx.scaling)
            if ctx.needs_input_grad[0]:
                for_x = _gradient_product(ctx.layer, grad).addmm_(for_hidden, a).view(ctx.shape)
            if ctx.needs_input_grad[1]:
                for_a = for_hidden.T @ rows
            if ctx.needs_input_grad[2]:
                for_b = (grad.T @ hidden).mul_(ctx.scaling)
        return for_x, for_a, for_b, None, None


def fuse(model: nn.Module) -> int:
    """Make the LoRA layers of a model's frozen Linear layers :class:`FusedLoraLinear`, in place.

    Args:
        model: Model with an adapter, on whose frozen weights it computes under autocast or in their dtype.

    Returns:
        The number of these layers.
    """
    count = 0
    for layer in model.modules():
        if type(layer) is not LoraLinear:
            continue
        lora: Any = layer
        base = lora.get_base_layer()
        frozen = not any(parameter.requires_grad for parameter in base.parameters())
        if frozen and (type(base) is nn.Linear or (isinstance(base, FrozenLinear) and base.stored_names)):
            lora.__class__ = FusedLoraLinear
            count += 1
    return count


def _product(layer: nn.Linear, rows: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, FrozenLinear):
        return layer.product(rows, bias)
    return F.linear(rows, layer.weight.to(rows.dtype), bias)


def _gradient_product(layer: nn.Linear, grad: Tensor) -> Tensor:
    return layer.gradient_product(grad) if isinstance(layer, FrozenLinear) else grad @ layer.weight.to(grad.dtype)
