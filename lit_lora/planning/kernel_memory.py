"""Temporary memory inside operations, which belongs to no tensor.

The CPU's formulas are those of PyTorch 2.14 with oneDNN 3.12; ``benchmarks/planner.py`` compares plans of whole runs with the
allocated memory. The GPU's formulas follow the sources of the attention kernels; two plans were compared with runs on an H100.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_NATIVE_UP_TO = 20480
"""Largest number of elements of a single float32 image's features for which PyTorch uses its own convolution."""
_ROW_BLOCK = 128
"""Rows in a block of CUDA's flash attention."""


def inside_cpu(func: Any, args: tuple[Any, ...], made: Any) -> int:
    """Bytes of the temporary memory of an operation on the CPU.

    * A convolution reorders its input and weight to oneDNN's blocked layout, and its output back.
    * Its backward pass reorders the weight and the output's gradient, and the input's gradient back. The gradient of a
      trained weight is reordered too, through float32 if it is in half precision.
    * Attention has one float32 block of scores and one of outputs per thread.
    * A layer norm makes its input contiguous, and nearest upsampling converts to channels-last.

    Args:
        func: Operation, an overload of ``torch.ops.aten``.
        args: Its positional arguments.
        made: Its result.
    """
    packet = func.overloadpacket
    if packet is aten.convolution:
        return _convolution(args[0], args[1], made)
    if packet is aten.convolution_backward:
        return _convolution_backward(args[0], args[1], args[2], made)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention_blocks(args[0], scores=1)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return _attention_blocks(args[1], scores=2)
    if packet is aten.native_layer_norm and not args[0].is_contiguous():
        return int(args[0].nbytes)
    if packet is aten.upsample_nearest2d:
        return int(args[0].nbytes + made.nbytes)
    return 0


def inside_cuda(func: Any, args: tuple[Any, ...], made: Any) -> int:
    """Bytes of the temporary memory of an operation on a GPU.

    Flash attention's backward pass sums the queries' gradients in float32, in blocks of rows, plus one float32 number
    per row. The workspaces of cuDNN and cuBLAS are an allowance of the plan: see
    :data:`~lit_lora.planning.device.WORKSPACES`.

    Args:
        func: Operation, an overload of ``torch.ops.aten``.
        args: Its positional arguments.
        made: Its result.
    """
    packet = func.overloadpacket
    if packet in (
        aten._scaled_dot_product_flash_attention_backward,
        aten._scaled_dot_product_efficient_attention_backward,
    ):
        batch, heads, rows, width = args[1].shape
        rows = -(-rows // _ROW_BLOCK) * _ROW_BLOCK
        return int(4 * batch * heads * rows * (-(-width // 32) * 32 + 1))
    return 0


def _convolution(features: Tensor, weight: Tensor, output: Tensor) -> int:
    if not _onednn_takes(features, weight):
        kernel = weight.shape[-2:].numel()
        columns = features.shape[1] * kernel * output.shape[-2:].numel() * features.element_size()
        return columns if kernel > 1 else 0
    return max(features.nbytes + weight.nbytes, output.nbytes)


def _convolution_backward(grad: Tensor, features: Tensor, weight: Tensor, made: Any) -> int:
    _, for_weight, *_ = made
    size = features.numel() * features.element_size()
    if for_weight is None:
        return grad.nbytes + size + (weight.nbytes if _onednn_takes(features, weight) else 0)
    if weight.element_size() < 4:
        return 2 * (weight.nbytes + size + grad.nbytes)
    return max(weight.nbytes, size + grad.nbytes)


def _onednn_takes(features: Tensor, weight: Tensor) -> bool:
    return (
        features.element_size() < 4
        or len(features) > 1
        or features.numel() > _NATIVE_UP_TO
        or max(weight.shape[-2:]) > 3
        or torch.get_num_threads() > 1
    )


def _attention_blocks(query: Tensor, scores: int) -> int:
    rows, width = query.shape[-2:]
    block = 256 if rows >= 768 else 64 if rows >= 192 else 32
    block = min(block, rows)
    halves = query.element_size() < 4
    per_thread = block * 512 * scores * (6 if halves else 4) + 4 * block * (width + 2)
    return int(torch.get_num_threads() * per_thread)
