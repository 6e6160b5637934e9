"""Layers with quantized frozen weights that save no tensor for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from lit_lora.quantization.base import Quantization, Stored

_last_restored: ContextVar[dict[FrozenLayer, Tensor] | None] = ContextVar("_last_restored", default=None)
"""The layer whose weight was asked for last, and the weight, in :func:`weights_asked_for_again`."""


@contextmanager
def weights_asked_for_again() -> Iterator[None]:
    """A context in which :attr:`FrozenLayer.weight` is restored once while the same layer is asked again and again.

    PEFT asks each layer some twenty times for its weight when it injects an adapter, mostly for the device.
    """
    token = _last_restored.set({})
    try:
        yield
    finally:
        _last_restored.reset(token)


class FrozenLayer(nn.Module):
    """A Linear or Conv2d layer with frozen weights.

    An ordinary frozen layer saves its weight and its input for the backward pass. This one saves neither: the gradient with
    respect to the input, ``dX = dY W``, needs only the weight, which the backward pass restores again. So a quantized weight
    never stays in memory in full precision, and the stored tensors may move between devices between the passes.

    :attr:`weight` is the restored weight, computed at each access unless it is stored densely.
    """

    quantization: Quantization
    stored_names: tuple[str, ...] = ()
    """Names of the parameters that hold the quantized weight."""
    weight_shape: torch.Size
    weight_dtype: torch.dtype
    """dtype of :attr:`weight`; forward and backward pass use the dtype of autocast or of the input."""

    @property
    def is_dense(self) -> bool:
        """Whether the weight is stored without quantization."""
        return "weight" in self._parameters

    @property
    def weight(self) -> Tensor:
        dense = self._parameters.get("weight")
        if dense is not None:
            return dense
        kept = _last_restored.get()
        if kept is None:
            return self.restored(self.weight_dtype)
        if self not in kept:
            kept.clear()  # before the next is restored, so that there is never more than one
            kept[self] = self.restored(self.weight_dtype)
        return kept[self]

    def stored(self) -> Stored:
        """The tensors that hold the weight."""
        return {name: self._parameters[name] for name in self.stored_names}  # type: ignore[misc]

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The restored weight in the given dtype."""
        with torch.no_grad():
            return self.quantization.dequantize(self.stored(), self.weight_shape, dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        dense: Tensor | None = self._parameters.get("weight")
        if dense is not None and (dense.requires_grad or not self.stored_names):
            # A trained copy, or a layer that PEFT created from the base layer's class.
            trained: Tensor = super().forward(input)
            return trained
        bias: Tensor | None = self._parameters.get("bias")
        if torch.is_autocast_enabled(input.device.type):
            dtype = computing_dtype(input)
            input = input.to(dtype)  # noqa: A001
            bias = bias if bias is None else bias.to(dtype)
        if torch.compiler.is_compiling():  # the compiler decides what to save for the backward pass
            return self.output(input, bias)
        return _Frozen.apply(input, bias, self)

    def output(self, input: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        """The output of the layer with this bias, in the input's dtype."""
        raise NotImplementedError

    def input_gradient(self, grad: Tensor, dtype: torch.dtype, input_shape: torch.Size) -> Tensor:
        """The gradient with respect to the input of a shape and dtype, from the gradient with respect to the output."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        kind = type(self.quantization).__name__ if self.stored_names else "own"
        return f"{super().extra_repr()}, stored={kind}"


class FrozenLinear(FrozenLayer, nn.Linear):  # type: ignore[override]  # weight is a property
    """A frozen Linear layer."""

    stays: ClassVar[bool] = True
    """Whether the stored tensors stay where they are between the passes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        dense: Tensor | None = self._parameters.get("weight")
        if dense is not None and self.stays and dense.dtype == computing_dtype(input):
            # torch's own operation saves no more than the stored weight itself, and takes less time to call.
            return F.linear(input, dense, self.bias)
        return super().forward(input)

    def output(self, input: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        if input.ndim == 2:
            return self.product(input, bias)
        rows = self.product(input.flatten(0, -2), bias)
        # A view as output of an autograd function would forbid PEFT's in-place additions.
        output: Tensor = torch.ops.aten._unsafe_view(rows, [*input.shape[:-1], rows.shape[-1]])
        return output

    def input_gradient(self, grad: Tensor, dtype: torch.dtype, input_shape: torch.Size) -> Tensor:
        return self.gradient_product(grad.flatten(0, -2)).view(input_shape)

    def product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """The output for inputs ``(n, in)``, in their dtype: see :meth:`Quantization.product`."""
        return self.quantization.product(rows, self.stored(), self.weight_shape, bias)

    def gradient_product(self, grad: Tensor) -> Tensor:
        """The gradient with respect to the input, from that with respect to the output, ``(n, out)``, in its dtype."""
        return self.quantization.gradient_product(grad, self.stored(), self.weight_shape)


class FrozenConv2d(FrozenLayer, nn.Conv2d):  # type: ignore[override]  # weight is a property
    """A frozen Conv2d layer."""

    def output(self, input: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        weight = self.restored(input.dtype)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, grad: Tensor, dtype: torch.dtype, input_shape: torch.Size) -> Tensor:
        weight = self.restored(dtype)
        gradient: Tensor = conv2d_input(
            list(input_shape), weight, grad, self.stride, self.padding, self.dilation, self.groups
        )
        return gradient


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: FrozenLayer) -> Tensor:  # noqa: A002
        ctx.layer, ctx.input_shape, ctx.dtype = layer, input.shape, input.dtype
        return layer.output(input, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer: FrozenLayer = ctx.layer
        for_input = for_bias = None
        if ctx.needs_input_grad[0]:
            for_input = layer.input_gradient(grad, ctx.dtype, ctx.input_shape)
        if ctx.needs_input_grad[1]:
            channels = 1 if isinstance(layer, nn.Conv2d) else grad.ndim - 1
            for_bias = grad.sum([i for i in range(grad.ndim) if i != channels])
        return for_input, for_bias, None


def computing_dtype(input: Tensor) -> torch.dtype:  # noqa: A002
    """The dtype in which a layer computes with an input."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


def frozen_layers(model: nn.Module) -> Iterator[FrozenLayer]:
    """The frozen layers of a model, without those that PEFT created from a base layer's class, which store nothing."""
    for layer in model.modules():
        if isinstance(layer, FrozenLayer) and layer.stored_names:
            yield layer


def quantized_layers(model: nn.Module) -> list[FrozenLayer]:
    """The frozen layers of a model whose weights are stored in another form."""
    return [layer for layer in frozen_layers(model) if not layer.is_dense]


def freeze_layer(layer: nn.Module, quantization: Quantization, weight: Tensor, dtype: torch.dtype) -> None:
    """Make a Linear or Conv2d layer a :class:`FrozenLayer`, in place.

    Args:
        layer: Layer that :func:`can_freeze` accepts.
        quantization: Quantization of the weight.
        weight: Weight to quantize; the layer's own weight is dropped.
        dtype: dtype of ``layer.weight``.
    """
    with torch.no_grad():
        put_stored(layer, quantization, quantization.quantize(weight), weight.shape, dtype)


def put_stored(
    layer: nn.Module, quantization: Quantization, stored: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
) -> None:
    """Make a Linear or Conv2d layer a :class:`FrozenLayer` with a weight that is quantized already, in place.

    Args:
        layer: Layer that :func:`can_freeze` accepts; its own weight is dropped.
        quantization: Quantization that made ``stored``.
        stored: Tensors that :meth:`Quantization.quantize` returned.
        shape: Shape of the weight.
        dtype: dtype of ``layer.weight``.
    """
    layer.__class__ = FrozenLinear if isinstance(layer, nn.Linear) else FrozenConv2d
    assert isinstance(layer, FrozenLayer)
    layer.quantization, layer.weight_shape, layer.weight_dtype = quantization, shape, dtype
    del layer._parameters["weight"]
    layer.stored_names = tuple(stored)
    for name, tensor in stored.items():
        layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def freezable(model: nn.Module) -> list[str]:
    """Names of the layers of a model that :func:`freeze_layer` accepts."""
    return [name for name, layer in model.named_modules() if can_freeze(layer)]


def can_freeze(layer: nn.Module) -> bool:
    """Whether :func:`freeze_layer` accepts the layer; subclasses are refused, since they may override ``forward``."""
    return type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )
