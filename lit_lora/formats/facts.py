"""Facts about a training run for the metadata of its adapter's files."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_lora.formats.learned_settings import settings_metadata
from lit_lora.formats.sampling_scheduler import scheduler_metadata

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def training_facts(module: LightningModule) -> dict[str, str]:
    """What is known about a module's training, under the keys of sd-scripts; without a trainer, what the module knows itself.

    A callback with a method ``training_facts`` adds what it returns.

    There are no dates and no number of processes among them, so that the same training gives the same bytes.

    Args:
        module: Module that a trainer or a loop of another kind trains or has trained.
    """
    facts = _of_the_module(module)
    if module._trainer is not None:
        facts |= _of_the_trainer(module.trainer)
    return {name: str(value) for name, value in facts.items() if value is not None}


def _of_the_module(module: LightningModule) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if saved := getattr(module, "saved", None):
        facts |= saved.training_facts(cast(Any, module).quantization)
    facts |= {
        "ss_mixed_precision": _PRECISIONS.get(getattr(module, "base_dtype", torch.float32), "no"),
        "ss_seed": getattr(module, "seed", None),
        "ss_caption_dropout_rate": getattr(module, "caption_dropout", None),
    }
    if isinstance(config := getattr(module, "_scheduler_config", None), dict):
        facts |= scheduler_metadata(cast(Any, module).family.scheduler_config, config) | settings_metadata(module)
    if getattr(getattr(module, "objective", None), "zero_terminal_snr", False):
        facts["ss_zero_terminal_snr"] = True
    return facts


def _of_the_trainer(trainer: Trainer) -> dict[str, Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    facts: dict[str, Any] = {}
    for callback in callbacks:
        facts |= getattr(callback, "training_facts", dict)()
    facts |= {
        "ss_steps": trainer.global_step,
        "ss_epoch": trainer.current_epoch,
        "ss_max_train_steps": trainer.max_steps if trainer.max_steps > 0 else None,
        "ss_gradient_accumulation_steps": trainer.accumulate_grad_batches,
        "ss_max_grad_norm": trainer.gradient_clip_val,
    }
    if trainer.optimizers:
        optimizer = trainer.optimizers[0]
        group = optimizer.param_groups[-1]  # of the parameters that have no rate of their own
        facts["ss_optimizer"] = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        facts["ss_learning_rate"] = float(group.get("initial_lr", group.get("lr", 0)))
    schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    facts["ss_lr_scheduler"] = schedulers[0] if schedulers else None
    datamodule = getattr(trainer, "datamodule", None)
    if isinstance(size := getattr(datamodule, "batch_size", None), int):
        facts["ss_total_batch_size"] = size * trainer.world_size * trainer.accumulate_grad_batches
    sizes = sorted(set(getattr(datamodule, "image_sizes", list)()))
    if len(sizes) == 1:
        height, width = sizes[0]
        facts["ss_resolution"] = f"({width}, {height})"
        facts["modelspec.resolution"] = f"{width}x{height}"
    return facts
