"""Makes fake CPU tensors follow CUDA's autocast rules and attention kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_IN_FLOAT32 = frozenset(
    {
        "group_norm",
        "layer_norm",
        "rms_norm",
        "norm",
        "softmax",
        "log_softmax",
        "softmin",
        "softplus",
        "mse_loss",
        "l1_loss",
    }
    | {
        "smooth_l1_loss",
        "huber_loss",
        "cross_entropy",
        "nll_loss",
        "kl_div",
        "cosine_similarity",
        "cdist",
        "sum",
        "prod",
    }
    | {
        "cumsum",
        "cumprod",
        "exp",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "pow",
        "rsqrt",
        "reciprocal",
        "tan",
        "acos",
    }
)
"""Functions that autocast computes in float32 on CUDA, but mostly not on the CPU (from the lists in ``torch/amp``)."""

_FLASH_WIDTH = 256
"""Largest head size of the flash attention kernels."""


class CudaSemantics(TorchFunctionMode):
    """Makes a step on fake CPU tensors allocate the same tensors as on a GPU, by CUDA's autocast rules and attention kernels.

    Fake CUDA tensors would be no alternative: without a GPU they cannot run a backward pass.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        if name in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_float32, (args, kwargs))
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the flash kernel where it applies, otherwise by the memory-efficient one; both save one float32 per row."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa and key.shape[1] != query.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    half = query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and half and query.shape[-1] <= _FLASH_WIDTH:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output: Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return output
    if attn_mask is not None:
        mask = attn_mask.to(query.dtype)
        attn_mask = mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    result: Tensor = efficient(query, key, value, attn_mask, gradients, dropout_p, is_causal, scale=scale)[0]
    return result
