"""Eight bits a weight: floating point and a scale for each output channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from lit_lora.quantization.scaled import Scaled


class FP8(Scaled):
    """Floating point of eight bits and a float32 scale for each output channel.

    Half of bfloat16's memory; small weights of a channel keep more of their precision than in ``Int8``, large ones less.

    Args:
        format: ``e4m3fn`` (three bits of mantissa) or ``e5m2`` (two, and a wider range): Micikevicius et al. 2022.
        skip: Glob patterns of further layers that stay in ``base_dtype``, such as ``mid_block.*``.
    """

    rounds: ClassVar[bool] = False

    def __init__(self, format: Literal["e4m3fn", "e5m2"] = "e4m3fn", skip: Sequence[str] = ()) -> None:  # noqa: A002
        super().__init__(skip)
        self.format = format
        self.dtype: torch.dtype = getattr(torch, f"float8_{format}")
        self.largest = torch.finfo(self.dtype).max
