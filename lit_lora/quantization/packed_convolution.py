"""Frozen convolutions whose weights are kept in the order in which a CPU computes with them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lit_lora.errors import UserError
from lit_lora.quantization.frozen_layer import FrozenConv2d


class PackedConv2d(FrozenConv2d):
    """A dense frozen convolution that keeps its weight in the order of oneDNN, for the forward and for the backward pass.

    oneDNN, torch's library for CPUs, reorders a weight in each call. Where images are small and layers wide, as in the inner
    blocks of a UNet, that takes longer than the convolution. Here it is done once, at the first call in each dtype. The two
    copies take twice the weight's memory, besides the weight itself.

    The gradient with respect to the input of a convolution with a stride of 1 is the convolution of the output's gradient with
    the weight mirrored in height and width and its channels exchanged. Strided and grouped convolutions are packed for the
    forward pass alone.
    """

    packed: _Copies

    def output(self, input: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002  torch's name
        weight = self.restored(input.dtype)
        # The compiler packs by itself, and a plan only counts.
        if torch.compiler.is_compiling() or isinstance(weight, FakeTensor) or not can_pack(weight.dtype):
            return super().output(input, bias)
        copy = self._copy("forward", weight, input.shape, self.padding, self.stride)
        return _convolve(input, copy, bias, self.padding, self.stride, self.dilation, self.groups)

    def input_gradient(self, grad: Tensor, dtype: torch.dtype, input_shape: torch.Size) -> Tensor:
        weight = self.restored(dtype)
        around = self._padding_of_gradient()
        if around is None or isinstance(weight, FakeTensor) or not can_pack(weight.dtype):
            return super().input_gradient(grad, dtype, input_shape)
        copy = self._copy("backward", weight, grad.shape, around, (1, 1))
        return _convolve(grad, copy, None, around, (1, 1), self.dilation, 1)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the copies in one dtype, once both passes have made theirs."""
        return self.weight.nbytes * (1 if self._padding_of_gradient() is None else 2)

    def _padding_of_gradient(self) -> list[int] | None:
        """Padding of the gradient's convolution; None if the gradient is computed otherwise."""
        sizes = zip(self.kernel_size, self.dilation, cast(tuple[int, int], self.padding), strict=True)
        around = [dilation * (size - 1) - padding for size, dilation, padding in sizes]
        return around if self.groups == 1 and set(self.stride) == {1} and min(around) >= 0 else None

    def _copy(self, kind: str, weight: Tensor, shape: torch.Size, padding: Any, stride: Any) -> Tensor:
        """The weight, packed for a pass; packed anew if the stored weight was changed or moved."""
        stored = self._parameters["weight"]
        assert stored is not None
        state = (stored.data_ptr(), 0 if stored.is_inference() else stored._version)
        found = self.packed.get((kind, weight.dtype))
        if found is not None and found[0] == state:
            return found[1]
        plain = weight if kind == "forward" else weight.flip(2, 3).transpose(0, 1).contiguous()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        copy: Tensor = reorder(plain.to_mkldnn(), padding, stride, self.dilation, self.groups, list(shape))
        self.packed[kind, weight.dtype] = state, copy
        return copy


class _Copies(dict[tuple[str, torch.dtype], tuple[tuple[int, int], Tensor]]):
    """Packed weights by pass and dtype, each with the state of the stored weight; copies of the layer pack their own."""

    def __reduce__(self) -> Any:
        return _Copies, ()


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in a dtype on this CPU: in bfloat16 and float16 it needs instructions such as AVX-512."""
    needs = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in needs or bool(getattr(torch.ops.mkldnn, needs[dtype])())


def pack_convolutions(model: nn.Module) -> None:
    """Make the dense frozen convolutions of a model :class:`PackedConv2d`, in place.

    Raises:
        UserError: If the model has none, or torch was built without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise UserError("convolutions='packed' needs torch with oneDNN, which this torch lacks; use 'plain'")
    layers = [
        layer for layer in model.modules() if type(layer) is FrozenConv2d and layer.stored_names and layer.is_dense
    ]
    if not layers:
        raise UserError(
            f"convolutions='packed' has no effect, since {type(model).__name__} has no Conv2d layer with a dense frozen weight; "
            f"use 'plain'"
        )
    for layer in layers:
        layer.__class__ = PackedConv2d
        assert isinstance(layer, PackedConv2d)
        layer.packed = _Copies()


def _convolve(
    input: Tensor,  # noqa: A002  torch's name
    packed: Tensor,
    bias: Tensor | None,
    padding: Any,
    stride: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    output: Tensor = torch.ops.mkldnn._convolution_pointwise(
        input, packed, bias, padding, stride, dilation, groups, "none", [], ""
    )
    return output
