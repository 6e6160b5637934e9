"""Strategies for adapters; importing this makes their names known to Lightning's Trainer."""

from lightning.pytorch.strategies import StrategyRegistry

from lit_lora.strategies.check import check_strategy, shares_out
from lit_lora.strategies.fsdp import LitLoraFSDP

__all__ = ["LitLoraFSDP", "check_strategy", "shares_out"]

if "lit_lora_fsdp" not in StrategyRegistry:
    StrategyRegistry.register("lit_lora_fsdp", LitLoraFSDP, description="FSDP2 for adapters")
