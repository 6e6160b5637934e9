"""Strategies for adapters; importing this makes their names known to Lightning's Trainer."""

from lightning.pytorch.strategies import StrategyRegistry

from lit_lora.strategies.check import check_strategy, check_strategy_name, is_ours, shares_out
from lit_lora.strategies.deepspeed import LitLoraDeepSpeed
from lit_lora.strategies.fsdp import LitLoraFSDP

__all__ = ["LitLoraDeepSpeed", "LitLoraFSDP", "check_strategy", "check_strategy_name", "is_ours", "shares_out"]

if "lit_lora_fsdp" not in StrategyRegistry:
    StrategyRegistry.register("lit_lora_fsdp", LitLoraFSDP, description="FSDP2 for adapters")
    for stage in (1, 2, 3):
        name, description = f"lit_lora_deepspeed_stage_{stage}", f"DeepSpeed's ZeRO-{stage} for adapters"
        StrategyRegistry.register(name, LitLoraDeepSpeed, description=description, stage=stage)
        StrategyRegistry.register(
            f"{name}_offload",
            LitLoraDeepSpeed,
            description=f"{description}, with host memory",
            stage=stage,
            offload_optimizer=True,
            **({"offload_parameters": True} if stage == 3 else {}),
        )
