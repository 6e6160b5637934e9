"""Checks whether a run can use a strategy and an optimizer."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.optim import ASGD, SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from lit_lora.errors import UserError

_ELEMENTWISE = (Adadelta, Adam, AdamW, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop, SGD)
"""Optimizers that update each element independently of the tensor it belongs to."""
_ELEMENTWISE_OF_DEEPSPEED = ("FusedAdam", "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedLion")

_NO_FSDP = "strategy fsdp is FSDP1, which cannot mix frozen and trained weights; use strategy lit_lora_fsdp (FSDP2)"
_NO_DEEPSPEED = (
    "Lightning's own DeepSpeed strategy makes the frozen base float32 and writes checkpoints that only it can read; use strategy "
    "lit_lora_deepspeed_stage_2, or stage_1 or stage_3"
)

_NAMES = "auto, ddp, ddp_find_unused_parameters_true, lit_lora_fsdp and lit_lora_deepspeed_stage_1, _2 and _3"


def is_ours(strategy: object) -> bool:
    """Whether the strategy is one of this package's, which shard weights, gradients or optimizer states."""
    return hasattr(strategy, "shards_weights")


def shards_weights(strategy: object) -> bool:
    """Whether the strategy leaves each process only a shard of the weights."""
    return bool(getattr(strategy, "shards_weights", False))


def check_strategy_name(name: object) -> None:
    """Check the strategy of a config before there is a trainer.

    Args:
        name: Value of ``trainer.strategy``; values other than names are accepted.

    Raises:
        UserError: If no strategy has the name, or it needs a replacement, which the message names.
    """
    if not isinstance(name, str):
        return
    if name.startswith("fsdp"):
        raise UserError(_NO_FSDP)
    if name.startswith("deepspeed"):
        raise UserError(_NO_DEEPSPEED)
    if name != "auto" and name not in StrategyRegistry:
        known = [one for one in StrategyRegistry.available_strategies() if not one.startswith(("fsdp", "deepspeed"))]
        close = get_close_matches(name, ["auto", *known], n=1)
        meant = f"did you mean {close[0]}? Others" if close else "the strategies"
        raise UserError(f"trainer.strategy={name!r} is not known; {meant} are {_NAMES}")


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
            f"strategy {type(strategy).__name__} expects the module to shard its weights; use strategy lit_lora_fsdp"
        )
    if isinstance(strategy, DeepSpeedStrategy) and not ours:
        raise UserError(_NO_DEEPSPEED)


def check_ranks(strategy: Any) -> None:
    """Check that the numbers of this process and its node are among those that a run has; torch would wait for the others.

    Args:
        strategy: Strategy of the trainer.

    Raises:
        UserError: If one is not.
    """
    environment = getattr(strategy, "cluster_environment", None)
    if environment is None:
        return
    for name, number, count in (
        ("process", environment.global_rank(), environment.world_size()),
        ("node", environment.node_rank(), getattr(strategy, "num_nodes", 1)),
    ):
        if number >= count:
            raise UserError(
                f"this is {name} {number} of a run with {count}, whose numbers are 0 to {count - 1}: give each {name} its own "
                f"(RANK and WORLD_SIZE of processes, NODE_RANK and trainer.num_nodes of nodes), or have torchrun or srun do it"
            )


def check_elementwise(optimizer: Optimizer, tensors: bool = False) -> None:
    """Check that an optimizer can step shards of the parameters, because its steps do not depend on their shapes.

    Args:
        optimizer: Optimizer of a strategy that gives each process shards of the parameters.
        tensors: Whether the shards are ``DTensor``, which take fewer operations. Defaults to false.

    Raises:
        UserError: If the optimizer is not known to update each element by itself; 8-bit optimizers do not.
    """
    kind = type(optimizer)
    if tensors and isinstance(optimizer, Rprop):
        raise UserError(
            "torch.optim.Rprop uses an operation that torch does not have for sharded tensors; use torch.optim.AdamW, or "
            "strategy ddp"
        )
    if not isinstance(optimizer, _ELEMENTWISE) and kind.__name__ not in _ELEMENTWISE_OF_DEEPSPEED:
        raise UserError(
            f"{kind.__module__}.{kind.__name__} is not known to update each element by itself, and this strategy gives each "
            f"process shards of the parameters; use torch.optim.AdamW, or strategy ddp"
        )
