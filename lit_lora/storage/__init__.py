"""How the frozen weights of the base are stored; each kind is an object with options."""

from lit_lora.storage.base import BaseStorage
from lit_lora.storage.dense import Dense
from lit_lora.storage.fp8 import FP8
from lit_lora.storage.int8 import Int8
from lit_lora.storage.nf4 import NF4

__all__ = ["BaseStorage", "Dense", "FP8", "Int8", "NF4"]
