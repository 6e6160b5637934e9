"""The strategies of this package; importing this registers their names with Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from lit_lora.distributed.check import check_strategy, check_strategy_name, is_ours, shards_weights
from lit_lora.distributed.deepspeed import LitLoraDeepSpeed
from lit_lora.distributed.fsdp import LitLoraFSDP

__all__ = ["LitLoraDeepSpeed", "LitLoraFSDP", "check_strategy", "check_strategy_name", "is_ours", "shards_weights"]

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
