"""Adapter methods: one module for each that needs more from training than optimizer steps.

``method_of.register`` registers the method of a further PEFT config, also from outside this package.
"""

from functools import singledispatch

from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    GloraConfig,
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
from lit_lora.adapters.methods.glora import GloraMethod
from lit_lora.adapters.methods.lora import LoraMethod
from lit_lora.adapters.methods.mica import MicaMethod
from lit_lora.adapters.methods.rebased import RebasedLoraMethod, is_rebased

__all__ = [
    "BLOCK_BY_BLOCK",
    "AdaLoraMethod",
    "AdapterMethod",
    "BlockByBlockMethod",
    "GloraMethod",
    "LoraMethod",
    "MicaMethod",
    "RebasedLoraMethod",
    "is_rebased",
    "method_of",
]

BLOCK_BY_BLOCK = (LoraConfig, LoHaConfig, LoKrConfig, OFTConfig, IA3Config, HRAConfig, VeraConfig, FourierFTConfig)
"""Configs whose adapters can be injected block by block; tests compare them with adapters injected into a loaded model."""


def lora_method(initialization: object) -> LoraMethod:
    """The method of a LoRA with this ``init_lora_weights``."""
    if initialization == "mica":
        return MicaMethod()
    return RebasedLoraMethod() if is_rebased(initialization) else LoraMethod()


@singledispatch
def method_of(config: PeftConfig | None) -> AdapterMethod:
    """The adapter method of a config; defaults to :class:`AdapterMethod` for configs without a registered method."""
    return AdapterMethod()


for _config_class in BLOCK_BY_BLOCK:
    method_of.register(_config_class, lambda config: BlockByBlockMethod())
method_of.register(
    LoraConfig,
    lambda config: lora_method(getattr(config, "init_lora_weights", True)),
)
method_of.register(AdaLoraConfig, lambda config: AdaLoraMethod())
method_of.register(GloraConfig, lambda config: GloraMethod())
