"""8-bit integer weights with one scale per output channel."""

from __future__ import annotations

from typing import ClassVar

import torch

from lit_lora.quantization.scaled import Scaled


class Int8(Scaled):
    """8-bit integer weights and one float32 scale per output channel: ``W ≈ scale * W8`` (symmetric absmax quantization).

    Half of bfloat16's memory. The error is at most 1/254 of a channel's largest weight, plus that of rounding to
    ``base_dtype``. Works on every device.

    Args:
        skip: Glob patterns of further layers that stay in ``base_dtype``, such as ``mid_block.*``; none by default.
    """

    dtype = torch.int8
    largest = 127.0
    rounds: ClassVar[bool] = True
