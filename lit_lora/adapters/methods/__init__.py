"""What adapter methods need beyond steps of the optimizer: one file for each method that needs more.

``method_of.register`` names the method of a further PEFT config, also from outside of this package.
"""

from functools import singledispatch

from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
)

from lit_lora.adapters.methods.adalora import AdaLoraMethod
from lit_lora.adapters.methods.base import AdapterMethod
from lit_lora.adapters.methods.block_by_block import BlockByBlockMethod

__all__ = ["BLOCK_BY_BLOCK", "AdaLoraMethod", "AdapterMethod", "BlockByBlockMethod", "method_of"]

BLOCK_BY_BLOCK = (LoraConfig, LoHaConfig, LoKrConfig, OFTConfig, IA3Config, HRAConfig, VeraConfig, FourierFTConfig)
"""Configs whose adapters can be put in block by block: tests compare them with adapters in a model with its weights."""


@singledispatch
def method_of(config: PeftConfig | None) -> AdapterMethod:
    """The method that a config belongs to; configs without a registered method need nothing special."""
    return AdapterMethod()


for _config_class in BLOCK_BY_BLOCK:
    method_of.register(_config_class, lambda config: BlockByBlockMethod())
method_of.register(AdaLoraConfig, lambda config: AdaLoraMethod())
