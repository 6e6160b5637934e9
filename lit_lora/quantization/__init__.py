"""Quantizations of the frozen base weights: one class for each."""

from lit_lora.quantization.base import Quantization
from lit_lora.quantization.dense import Dense
from lit_lora.quantization.fp8 import FP8
from lit_lora.quantization.int8 import Int8
from lit_lora.quantization.nf4 import NF4
from lit_lora.quantization.w8a8 import W8A8

__all__ = ["Quantization", "Dense", "FP8", "Int8", "NF4", "W8A8"]
