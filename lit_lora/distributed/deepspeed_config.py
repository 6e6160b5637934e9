"""DeepSpeed's config: which keys a user may set, and the values that suit an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_lora.errors import UserError

_OURS = ("fp16", "bf16", "optimizer", "scheduler", "gradient_accumulation_steps", "gradient_clipping")
"""Keys of a DeepSpeed config that follow from the trainer and the module."""

_BUCKET = 10_000_000
"""Number of elements that are reduced or gathered at once. DeepSpeed allocates this many, and an adapter needs few."""


def read_config(config: dict[str, Any] | str | Path | None) -> dict[str, Any]:
    """Read and check the user's part of the DeepSpeed config.

    Args:
        config: Keys of a DeepSpeed config, or a JSON file with them; None for none.

    Raises:
        UserError: If the file cannot be read, or a key follows from the trainer or the module.
    """
    if isinstance(config, str | Path):
        try:
            keys = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"config: {config} cannot be read as JSON: {error}; name another file") from error
    else:
        keys = config or {}
    if not isinstance(keys, dict):
        raise UserError(f"config: {config} holds a {type(keys).__name__}; it must hold a dict of DeepSpeed's keys")
    taken = [key for key in _OURS if key in keys]
    if "stage" in keys.get("zero_optimization", {}):
        taken.append("zero_optimization.stage")
    if taken:
        raise UserError(
            f"config: {', '.join(taken)} cannot be set in DeepSpeed's config here; remove it, and set the strategy's stage, the "
            f"model's optimizer, lr_scheduler and base_dtype, and the trainer's gradient_clip_val and accumulate_grad_batches"
        )
    return keys


def complete_config(
    stage: int, offload_optimizer: bool, offload_parameters: bool, config: dict[str, Any]
) -> dict[str, Any]:
    """Complete the user's keys to a DeepSpeed config, except for keys that the run sets, such as gradient clipping.

    Args:
        stage: Stage of ZeRO.
        offload_optimizer: Keep the optimizer state in host memory.
        offload_parameters: Keep the shards of the weights in host memory.
        config: Keys set by the user, which take precedence.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
        "memory_efficient_linear": False,  # it would replace torch's own function for the rest of the process
        # By default a base of less than a billion weights stays gathered once it has been gathered.
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 5 * _BUCKET,
        "stage3_prefetch_bucket_size": _BUCKET,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,  # used only in DeepSpeed's own statistics
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
        "zero_optimization": {**zero, **config.get("zero_optimization", {})},
    }
