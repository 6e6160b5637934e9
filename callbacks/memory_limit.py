"""A limit on the memory of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_lora.argument_types import check_types
from lit_lora.byte_sizes import parse_bytes
from lit_lora.callbacks.adapter_ema import AdapterEMA
from lit_lora.callbacks.sample_images import SampleImages
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from lit_lora.planning.changes import cheapest_changes
from lit_lora.planning.data_options import cacheable, data_option, image_size
from lit_lora.planning.device import device_of
from lit_lora.planning.plan_run import plan
from lit_lora.planning.processes import processes_with
from lit_lora.planning.run import Run, Sampling
from lit_lora.planning.verdict import verdict
from lit_lora.run_checks import has_validation


class MemoryLimit(Callback):
    """Plans the memory of a fit before anything is loaded, and refuses a run whose planned memory exceeds a limit.

    The error names the cheapest changes that make the run fit, as ``lit-lora plan`` does.

    Args:
        limit: Maximum memory of the run on each device, such as ``"8GB"``.

    Raises:
        UserError: If ``limit`` is not a byte size.
    """

    def __init__(self, limit: str) -> None:
        check_types(MemoryLimit, locals())
        self.limit = limit
        self._allowed = parse_bytes("limit", limit)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, LoraDiffusion):
            raise UserError(
                f"MemoryLimit can plan a LoraDiffusion, not a {type(pl_module).__name__}; remove it from trainer.callbacks"
            )
        run = run_of(pl_module, trainer)
        planned = plan(run)
        if not planned.fits(self._allowed):
            changes = cheapest_changes(run, self._allowed, planned)
            raise UserError(f"MemoryLimit: {verdict(planned, self._allowed, changes)}")


def run_of(module: LoraDiffusion, trainer: Trainer) -> Run:
    """Description of a trainer's run, for the planner.

    Args:
        module: Module that is trained.
        trainer: Trainer of the run, with its datamodule and callbacks.

    Raises:
        UserError: If the datamodule does not state its batch size or image size.
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
        **cacheable(data),
        averaged=any(isinstance(callback, AdapterEMA) for callback in callbacks),
        validation=bool(trainer.limit_val_batches) and has_validation(data),
        sampling=None if samples is None else Sampling.of(samples.prompts, samples.options),
        processes=processes_with(
            trainer.strategy, trainer.world_size, trainer.num_devices, trainer.accumulate_grad_batches > 1
        ),
    )
