"""Which strategies a run can have."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim import ASGD, SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from lit_lora.errors import UserError

_ELEMENTWISE = (Adadelta, Adam, AdamW, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop, SGD)
"""Optimizers that do the same to an element whatever tensor it is in."""
_ELEMENTWISE_OF_DEEPSPEED = ("FusedAdam", "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedLion")

_NO_FSDP = (
    "strategy fsdp is FSDP1, which takes no frozen weights beside trained ones; use strategy lit_lora_fsdp (FSDP2)"
)
_NO_DEEPSPEED = (
    "DeepSpeed as Lightning has it makes the frozen base float32 and writes checkpoints that only it can read; use strategy "
    "lit_lora_deepspeed_stage_2, or stage_1 or stage_3"
)


def is_ours(strategy: object) -> bool:
    """Whether the strategy is one of this package's, which share something out over the processes."""
    return hasattr(strategy, "shards_weights")


def shards_weights(strategy: object) -> bool:
    """Whether the strategy leaves each process a part of the weights only."""
    return bool(getattr(strategy, "shards_weights", False))


def check_strategy_name(name: object) -> None:
    """Make sure, before there is a trainer, that a strategy of a config is none that another has to replace.

    Args:
        name: A name, or whatever else a config has there.

    Raises:
        UserError: If it is refused; the message names the strategy to take instead.
    """
    if isinstance(name, str) and name.startswith("fsdp"):
        raise UserError(_NO_FSDP)
    if isinstance(name, str) and name.startswith("deepspeed"):
        raise UserError(_NO_DEEPSPEED)


def check_strategy(strategy: object) -> None:
    """Check that adapters can be trained with a strategy.

    Args:
        strategy: Strategy of the trainer.

    Raises:
        UserError: If it needs a replacement, which the message names.
    """
    ours = is_ours(strategy)
    if isinstance(strategy, FSDPStrategy):
        raise UserError(_NO_FSDP)
    if isinstance(strategy, ModelParallelStrategy) and not ours:
        raise UserError(
            f"strategy {type(strategy).__name__} leaves the sharing out of weights to the module; use strategy lit_lora_fsdp"
        )
    if isinstance(strategy, DeepSpeedStrategy) and not ours:
        raise UserError(_NO_DEEPSPEED)


def check_elementwise(optimizer: Optimizer) -> None:
    """Refuse optimizers whose steps depend on the shapes of the parameters, where each process steps pieces of them.

    Raises:
        UserError: If the optimizer is not known to step each element by itself, as those in eight bits do not.
    """
    kind = type(optimizer)
    if not isinstance(optimizer, _ELEMENTWISE) and kind.__name__ not in _ELEMENTWISE_OF_DEEPSPEED:
        raise UserError(
            f"{kind.__module__}.{kind.__name__} does not step each element by itself, as far as is known, and this strategy "
            f"gives each process pieces of the parameters; use torch.optim.AdamW, or strategy ddp"
        )
