"""Which strategies a run can have."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from peft import AdaLoraConfig, PeftConfig

from lit_lora.errors import UserError


def shares_out(strategy: object) -> bool:
    """Whether the strategy leaves each process a part of the weights only."""
    return bool(getattr(strategy, "shards_weights", False))


def check_strategy(strategy: object, adapter: PeftConfig | None = None) -> None:
    """Make sure that an adapter can be trained so.

    Args:
        strategy: Of the trainer.
        adapter: What is trained.

    Raises:
        UserError: It cannot; the message names the strategy to take instead.
    """
    ours = hasattr(strategy, "shards_weights")
    if isinstance(strategy, FSDPStrategy):
        raise UserError(
            "strategy fsdp is FSDP1, which takes no frozen weights beside trained ones; use strategy lit_lora_fsdp (FSDP2)"
        )
    if isinstance(strategy, ModelParallelStrategy) and not ours:
        raise UserError(
            f"strategy {type(strategy).__name__} leaves the sharing out of weights to the module; use strategy lit_lora_fsdp"
        )
    if isinstance(strategy, DeepSpeedStrategy) and not ours:
        raise UserError(
            "DeepSpeed as Lightning has it makes the frozen base float32 and writes checkpoints that only it can read; use "
            "strategy lit_lora_deepspeed_stage_2, or stage_1 or stage_3"
        )
    if ours and isinstance(adapter, AdaLoraConfig):
        raise UserError(
            f"AdaLoRA allocates ranks by whole gradients, and {type(strategy).__name__} leaves each process a part of them; use "
            f"strategy ddp, or peft.LoraConfig"
        )
