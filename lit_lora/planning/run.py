"""What a run is, as far as its memory depends on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from lit_lora.errors import UserError, check_least
from lit_lora.module import LoraDiffusion
from lit_lora.planning.device import Device, find_device
from lit_lora.sampling import IMAGES_AT_A_TIME


@dataclass(frozen=True)
class Sampling:
    """Pictures that are drawn while training.

    Args:
        pictures: Images drawn at a time.
        guidance_scale: Guidance scale of the pipeline.
        height: In pixels; None for the model's own.
        width: In pixels; None for the model's own.
    """

    pictures: int = 1
    guidance_scale: float = 5.0
    height: int | None = None
    width: int | None = None

    @classmethod
    def of(cls, prompts: Sequence[str], options: Mapping[str, Any]) -> Self:
        """What :class:`SampleImages` with these prompts and options draws."""
        pictures = min(IMAGES_AT_A_TIME, len(prompts))
        return cls(pictures, options["guidance_scale"], options["height"], options["width"])


@dataclass(frozen=True)
class Run:
    """A run to plan.

    Args:
        module: What is trained; it may be loaded or not, and stays as it is.
        batch_size: Samples in a batch of one process.
        height: Of the pictures, in pixels.
        width: Of the pictures, in pixels.
        device: What trains.
        accumulate_grad_batches: Batches between two steps of the optimizer.
        gradient_clip_val: As the Trainer's; the value does not matter, None means no clipping.
        precision: As the Trainer's.
        cached: What the batches have from a cache: ``"latents"``, ``"text"``.
        averaged: Whether an average of the adapter is kept.
        validation: Whether there is validation, in batches of the same size.
        sampling: Pictures that are drawn while training.
        processes: That train together; the plan is that of one.

    Raises:
        UserError: A number is below 1, or a picture is no multiple of the VAE's.
    """

    module: LoraDiffusion
    batch_size: int
    height: int
    width: int
    device: Device = field(default_factory=lambda: find_device("cpu"))
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    precision: str = "32-true"
    cached: frozenset[str] = frozenset()
    averaged: bool = False
    validation: bool = False
    sampling: Sampling | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        check_least(1, batch_size=self.batch_size, accumulate_grad_batches=self.accumulate_grad_batches)
        check_least(8, height=self.height, width=self.width)
        unknown = self.cached - {"latents", "text"}
        if unknown:
            raise UserError(f"cached={sorted(self.cached)} holds {min(unknown)!r}; a cache has latents and text")
