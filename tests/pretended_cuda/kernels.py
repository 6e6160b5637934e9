"""Gives torch the kernels of the pretended GPU when it is imported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes  # noqa: F401  it registers operations, whose kernels are replaced
import torch
from torch import Tensor, distributed

torch.ops.load_library(os.environ["LIT_LORA_CUDA_KERNELS"])

_here, _there = torch.ops.pretended_cuda.as_cpu, torch.ops.pretended_cuda.as_cuda
_COMPUTES = os.environ.get("LIT_LORA_CUDA_COMPUTES") != "0"

_aten = torch.ops.aten
_own = torch.library.Library("aten", "IMPL", "CUDA")


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Without torch's warning for each kernel that is replaced, which Python cannot filter."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _of_cuda(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for the kernel of an operation that the CPU has under another name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _own.impl(name, function)
        return function

    return register


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *options: Any, scale: float | None) -> list[Tensor]:
    if not _COMPUTES:
        return [torch.empty_like(q), torch.empty(q.shape[:-1], device=q.device)]
    bias = None if bias is None else _here(bias)
    forward = _aten._scaled_dot_product_flash_attention_for_cpu
    return [_there(one) for one in forward(_here(q), _here(k), _here(v), *options, attn_mask=bias, scale=scale)]


def _gradients(tensors: tuple[Tensor, ...], bias: Tensor | None, *options: Any, scale: float | None) -> list[Tensor]:
    if not _COMPUTES:
        return [torch.empty_like(one) for one in tensors[1:4]]
    bias = None if bias is None else _here(bias)
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    return [_there(one) for one in backward(*map(_here, tensors), *options, attn_mask=bias, scale=scale)]


with _without_stderr():
    for space in ("aten", "torchvision", "bitsandbytes"):
        torch.ops.pretended_cuda.replace(space)

    @_of_cuda("_scaled_dot_product_flash_attention")
    def _flash(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        output, logsumexp = _attended(q, k, v, None, dropout, is_causal, scale=scale)
        nothing = torch.empty(0, dtype=torch.int32, device=q.device)
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        mask = torch.empty(0, device=q.device)
        return output, logsumexp, nothing, nothing, q.shape[2], k.shape[2], seed, seed[0], mask

    @_of_cuda("_scaled_dot_product_flash_attention_backward")
    def _flash_backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        *rest: Any,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        dropout, is_causal = rest[4:6]
        return tuple(_gradients((grad, q, k, v, output, logsumexp), None, dropout, is_causal, scale=scale))

    @_of_cuda("_scaled_dot_product_efficient_attention")
    def _efficient(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        computes_logsumexp: bool,
        dropout: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        seed = torch.zeros(2, dtype=torch.int64, device=q.device)
        return *_attended(q, k, v, bias, dropout, is_causal, scale=scale), seed[0], seed[1]

    @_of_cuda("_scaled_dot_product_efficient_attention_backward")
    def _efficient_backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        output: Tensor,
        logsumexp: Tensor,
        *rest: Any,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        dropout, is_causal = rest[2], bool(rest[4:] and rest[4])
        return *_gradients((grad, q, k, v, output, logsumexp), bias, dropout, is_causal, scale=scale), None

    @_of_cuda("_fused_rms_norm_backward")
    def _rms_norm_backward(
        grad: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, wanted: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        normalized = x.float() * rstd
        scaled = grad.float() if weight is None else grad.float() * weight.float()
        mean = (scaled * normalized).mean(list(range(-len(shape), 0)), keepdim=True)
        of_weight = (grad.float() * normalized).flatten(0, -len(shape) - 1).sum(0)
        for_x = ((scaled - normalized * mean) * rstd).to(x.dtype) if wanted[0] else None
        return for_x, of_weight.to(weight.dtype) if weight is not None and wanted[1] else None


torch.backends.cuda.enable_cudnn_sdp(False)

_init_process_group = distributed.init_process_group


def _with_gloo(backend: str | None = None, *args: Any, device_id: object = None, **options: Any) -> None:
    _init_process_group("gloo", *args, **options)


distributed.init_process_group = _with_gloo  # type: ignore[assignment]
