"""Eight bits a weight: integers and a scale for each output channel."""

from __future__ import annotations

from typing import ClassVar

import torch

from lit_lora.quantization.scaled import Scaled


class Int8(Scaled):
    """Integers from -127 to 127 and a float32 scale for each output channel (absmax quantisation, symmetric).

    Half of bfloat16's memory, an error of at most 1/254 of a channel's largest weight, and that of rounding to ``base_dtype``.
    Works on every device.

    Args:
        skip: Glob patterns of further layers that stay in ``base_dtype``, such as ``mid_block.*``.
    """

    dtype = torch.int8
    largest = 127.0
    rounds: ClassVar[bool] = True
