"""NF4, the 4-bit quantization of QLoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lit_lora.argument_types import check_types
from lit_lora.errors import UserError, check_whole
from lit_lora.quantization.base import Quantization, Stored

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Values of the 16 codes: quantiles of the normal distribution (Dettmers et al. 2023, appendix E)."""

_SCALES_PER_GROUP = 256
_BITSANDBYTES_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes' kernels support."""
_BYTES_AT_A_TIME = 1 << 20


class NF4(Quantization):
    """4-bit weights and one scale per block of weights: QLoRA's NF4 (Dettmers et al., 2023), also for convolutions.

    About a quarter of bfloat16's memory. Where bitsandbytes is installed, its kernels dequantize on CUDA; the stored bytes
    equal those of bitsandbytes.

    Args:
        block_size: Number of weights that share a scale, even; defaults to 64. Smaller blocks are more exact and take more
            memory.
        double_quant: Store the scales in 8 bits, which takes 0.13 instead of 0.5 bits per weight with blocks of 64; on by
            default.
        skip: Glob patterns of further layers that stay in ``base_dtype``, such as ``mid_block.*``; none by default.

    Raises:
        UserError: If ``block_size`` is not a positive even number.
    """

    def __init__(self, block_size: int = 64, double_quant: bool = True, skip: Sequence[str] = ()) -> None:
        check_types(NF4, locals())
        super().__init__(skip)
        check_whole(2, block_size=block_size)
        if block_size % 2:
            raise UserError(
                f"block_size={block_size} is not possible; it must be an even number of at least 2, usually 64"
            )
        self.block_size = block_size
        self.double_quant = double_quant

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        blocks = _padded(weight.flatten(), self.block_size).view(-1, self.block_size)
        levels = torch.tensor(LEVELS, device=weight.device)
        middles = (levels[1:] + levels[:-1]) / 2
        scale = torch.empty(len(blocks), device=weight.device)
        packed = torch.empty(blocks.numel() // 2, dtype=torch.uint8, device=weight.device)
        at_a_time = max(1, _BYTES_AT_A_TIME // self.block_size)
        # In a plan, whose tensors have no contents, the first piece takes the memory of all.
        count = min(len(blocks), at_a_time) if isinstance(weight, FakeTensor) else len(blocks)
        # In pieces, because intermediate tensors take several times the memory of the weights.
        for start in range(0, count, at_a_time):
            piece = slice(start, start + at_a_time)
            values = blocks[piece].float()
            scale[piece] = values.abs().amax(dim=1)
            relative = values / scale[piece, None].clamp(min=torch.finfo(torch.float32).tiny)
            codes = torch.bucketize(relative, middles, out_int32=True).to(torch.uint8).view(-1, 2)
            half = self.block_size // 2
            packed[start * half : (start + len(values)) * half] = (codes[:, 0] << 4).bitwise_or_(codes[:, 1])
        return {"weight_data": packed, "weight_levels": levels, **self._store_scale(scale)}

    def dequantize(self, stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        count = shape.numel()
        data, scale = stored["weight_data"], self._restore_scale(stored)
        # The CPU kernels compile at first use, which takes longer than they save.
        if data.is_cuda and self.block_size in _BITSANDBYTES_SIZES and _bitsandbytes_is_here():
            padded = [data.numel() * 2]
            weight = torch.ops.bitsandbytes.dequantize_4bit(data, scale, self.block_size, "nf4", padded, dtype)
        else:
            weight = _look_up(data, stored["weight_levels"].to(dtype))
            weight.view(-1, self.block_size).mul_(scale.to(dtype)[:, None])
        return weight.view(-1)[:count].view(shape)

    def _store_scale(self, scale: Tensor) -> dict[str, Tensor]:
        """The scales, or with double quantization their 8-bit differences from the mean, scaled by group."""
        if not self.double_quant:
            return {"weight_scale": scale}
        mean = scale.mean()
        groups = _padded(scale - mean, _SCALES_PER_GROUP).view(-1, _SCALES_PER_GROUP)
        step = groups.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
        data = (groups / step[:, None]).round_().to(torch.int8).flatten()[: scale.numel()].clone()
        return {"weight_scale": data, "weight_scale_step": step, "weight_scale_mean": mean[None]}

    def _restore_scale(self, stored: Stored) -> Tensor:
        scale = stored["weight_scale"]
        if not self.double_quant:
            return scale
        steps = stored["weight_scale_step"].repeat_interleave(_SCALES_PER_GROUP)[: scale.numel()]
        return steps.mul_(scale).add_(stored["weight_scale_mean"])


def _padded(values: Tensor, multiple: int) -> Tensor:
    missing = math.ceil(values.numel() / multiple) * multiple - values.numel()
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def _look_up(data: Tensor, levels: Tensor) -> Tensor:
    """The two levels of each byte, high half first: ``(2 * bytes,)``.

    Pairs of levels are looked up as one integer, and in pieces, since an index takes four bytes per byte of data.
    """
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    integer = torch.int32 if levels.element_size() == 2 else torch.int64
    table = pairs.view(integer).flatten()
    found = torch.empty(data.numel(), dtype=integer, device=data.device)
    for start in range(0, data.numel(), _BYTES_AT_A_TIME):
        piece = slice(start, start + _BYTES_AT_A_TIME)
        torch.index_select(table, 0, data[piece].int(), out=found[piece])
    return found.view(levels.dtype)


@cache
def _bitsandbytes_is_here() -> bool:
    """Whether bitsandbytes is installed, so that its kernels can be called."""
    if find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes.functional  # noqa: F401  registers the operations

    return True
