"""8-bit floating point weights with one scale per output channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from lit_lora.argument_types import check_types
from lit_lora.quantization.scaled import Scaled


class FP8(Scaled):
    """8-bit floating point weights and one float32 scale per output channel: ``W ≈ scale * W8``.

    Half of bfloat16's memory. Small weights of a channel keep more precision than with ``Int8``, large ones less.

    Args:
        format: ``e4m3fn`` (3 bits of mantissa, the default) or ``e5m2`` (2 bits, wider range), from Micikevicius et al., 2022.
        skip: Glob patterns of further layers that stay in ``base_dtype``, such as ``mid_block.*``; none by default.
    """

    rounds: ClassVar[bool] = False

    def __init__(self, format: Literal["e4m3fn", "e5m2"] = "e4m3fn", skip: Sequence[str] = ()) -> None:  # noqa: A002
        check_types(FP8, locals())
        super().__init__(skip)
        self.format = format
        self.dtype: torch.dtype = getattr(torch, f"float8_{format}")
        self.largest = torch.finfo(self.dtype).max
