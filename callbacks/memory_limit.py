"""A limit on the memory of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_lora.byte_sizes import parse_bytes
from lit_lora.callbacks.adapter_ema import AdapterEMA
from lit_lora.callbacks.sample_images import SampleImages
from lit_lora.distributed import shards_weights
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from lit_lora.planning.changes import cheapest_changes
from lit_lora.planning.data_options import data_option, has_validation, image_size
from lit_lora.planning.device import device_of
from lit_lora.planning.plan_run import plan
from lit_lora.planning.run import Run, Sampling
from lit_lora.planning.verdict import verdict


class MemoryLimit(Callback):
    """Plans the memory of a fit before anything is loaded, and refuses a run that is planned to take more than a limit.

    The error names the cheapest changes that make the run fit, as ``lit-lora plan`` does.

    Args:
        limit: Bytes that the run may take on each device, such as ``"8GB"``.

    Raises:
        UserError: If ``limit`` is no amount of bytes.
    """

    def __init__(self, limit: str) -> None:
        self.limit = limit
        self._allowed = parse_bytes("limit", limit)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, LoraDiffusion):
            raise UserError(
                f"MemoryLimit plans the runs of a LoraDiffusion, not of a {type(pl_module).__name__}; leave MemoryLimit out"
            )
        if shards_weights(trainer.strategy):
            raise UserError(
                f"MemoryLimit(limit={self.limit!r}) plans a run with a full copy of the weights on each GPU, which "
                f"{type(trainer.strategy).__name__} does not have; leave MemoryLimit out"
            )
        run = run_of(pl_module, trainer)
        planned = plan(run)
        if not planned.fits(self._allowed):
            changes = cheapest_changes(run, self._allowed, planned)
            raise UserError(f"MemoryLimit: {verdict(planned, self._allowed, changes)}")


def run_of(module: LoraDiffusion, trainer: Trainer) -> Run:
    """The run that a trainer is about to start or has started.

    Args:
        module: What is trained.
        trainer: Trainer of the run, with its datamodule and callbacks.

    Raises:
        UserError: If the datamodule does not say how large a batch or an image is.
    """
    data: Any = getattr(trainer, "datamodule", None)
    height, width = image_size(data)
    by_norm = trainer.gradient_clip_algorithm != "value"
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    samples = next((callback for callback in callbacks if isinstance(callback, SampleImages)), None)
    return Run(
        module,
        data_option(data, "batch_size"),
        height,
        width,
        device=device_of(trainer.strategy.root_device),
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=float(trainer.gradient_clip_val) if trainer.gradient_clip_val and by_norm else None,
        precision=str(trainer.precision),
        cached=frozenset(getattr(data, "cached", ())),
        averaged=any(isinstance(callback, AdapterEMA) for callback in callbacks),
        validation=bool(trainer.limit_val_batches) and has_validation(data),
        sampling=None if samples is None else Sampling.of(samples.prompts, samples.options),
        processes=trainer.world_size,
    )
