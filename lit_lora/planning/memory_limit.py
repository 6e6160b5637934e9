"""A limit on the memory of a run, which its plan is held against before anything is loaded."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from lit_lora.byte_sizes import format_bytes
from lit_lora.callbacks.adapter_ema import AdapterEMA
from lit_lora.callbacks.sample_images import SampleImages
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from lit_lora.planning.changes import CANDIDATES, ChangedRun, cheapest_changes
from lit_lora.planning.device import device_of
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.plan_run import plan
from lit_lora.planning.run import Run, Sampling


def check_memory_limit(module: LoraDiffusion, trainer: Trainer, limit: int) -> None:
    """Plan the run and refuse one that is planned to take more than the limit.

    Args:
        module: What is trained; nothing needs to be loaded yet.
        trainer: Of the run, with its datamodule.
        limit: Bytes that the run may take.

    Raises:
        UserError: The run does not fit, or the data do not say how large a batch is.
    """
    run = run_of(module, trainer)
    planned = plan(run)
    if not planned.fits(limit):
        raise UserError(f"MemoryLimit: {verdict(planned, limit, cheapest_changes(run, limit, planned))}")


def run_of(module: LoraDiffusion, trainer: Trainer) -> Run:
    """The run that a trainer is about to start.

    Raises:
        UserError: The data do not say how large a batch is.
    """
    data: Any = getattr(trainer, "datamodule", None)
    height, width = picture_size(data, None)
    by_norm = trainer.gradient_clip_algorithm != "value"
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    samples = next((callback for callback in callbacks if isinstance(callback, SampleImages)), None)
    return Run(
        module,
        known(data, "batch_size"),
        height,
        width,
        device=device_of(trainer.strategy.root_device),
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=float(trainer.gradient_clip_val) if trainer.gradient_clip_val and by_norm else None,
        precision=str(trainer.precision),
        cached=frozenset(getattr(data, "cached", ())),
        averaged=any(isinstance(callback, AdapterEMA) for callback in callbacks),
        validation=bool(trainer.limit_val_batches) and validates(data),
        sampling=None if samples is None else Sampling.of(samples.prompts, samples.options),
        processes=trainer.world_size,
    )


def picture_size(data: Any, resolution: int | None) -> tuple[int, int]:
    """Height and width of the largest pictures, in pixels.

    Args:
        data: The run's data.
        resolution: Edge of a square picture; None for what the data say.

    Raises:
        UserError: Neither says it.
    """
    edge = resolution or known(data, "resolution")
    buckets = getattr(data, "buckets", None)
    if buckets is None:
        return edge, edge
    height, width = max(buckets.sizes(edge).tolist(), key=lambda size: size[0] * size[1])
    return int(height), int(width)


def known(data: Any, name: str) -> int:
    """A number that a datamodule has.

    Raises:
        UserError: It has none.
    """
    value = getattr(data, name, None)
    if not isinstance(value, int):
        who = "there is no datamodule that says" if data is None else f"{type(data).__name__} does not say"
        raise UserError(
            f"the memory of the run cannot be planned, since {who} its {name}: use one that does, leave MemoryLimit out, or "
            f"call lit-lora plan with --{name} N"
        )
    return value


def validates(data: Any) -> bool:
    """Whether a datamodule has something to validate on."""
    if hasattr(data, "val_samples"):
        return bool(data.val_shards or data.val_samples)
    return hasattr(data, "val_dataloader") and type(data).val_dataloader is not LightningDataModule.val_dataloader


def verdict(planned: MemoryPlan, memory: int, changes: list[ChangedRun] | None) -> str:
    """Whether it fits, and if not, what makes it fit."""
    said = f"{format_bytes(planned.needed)} of {format_bytes(memory)}"
    if planned.fits(memory):
        return f"fits: {said}"
    if changes is None:
        return f"does not fit: {said}, and none of {len(CANDIDATES)} kinds of changes together make it fit"
    lines = [f"does not fit: {said}. The cheapest changes that make it fit, one upon the other:"]
    for one in changes:
        lines.append(f"  {one.change.arguments}   needs {format_bytes(one.plan.needed)} ({one.change.price})")
    return "\n".join(lines)
