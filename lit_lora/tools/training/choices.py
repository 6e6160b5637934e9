"""The rules by which ``lit-lora train`` chooses the settings of a run: pure functions of the images and the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lit_lora.datamodules.batches.buckets import AspectRatioBuckets
from lit_lora.errors import UserError, check_least, check_whole
from lit_lora.loops import passes_in
from lit_lora.tools.training.base import Base
from lit_lora.tools.training.images import Images

_LEAST_HELD_OUT = 4
"""Of fewer images none is held out for validation: each counts, as DreamBooth's three to five do."""

_DIVISOR = 64
"""Pixels of which heights and widths of buckets are multiples."""
_STEPS = (300, 10_000)
_DROPPED = 0.1
"""Share of the images that may be left out of a pass because they fill no batch; each pass leaves out others."""


class Choice(NamedTuple):
    """A choice, for the screen and for a comment in the config, before ``key``."""

    name: str
    value: str
    why: str
    key: str


@dataclass(frozen=True)
class Settings:
    """The settings of a run that are chosen.

    Args:
        resolution: Edge of a square image in pixels.
        buckets: Whether images keep their aspect ratio, in buckets.
        val_samples: Images that are held out for the validation loss.
        batch_size: Images in a batch.
        accumulate: Batches in an optimizer step.
        steps: Optimizer steps.
        rank: Rank of the adapter, and its ``lora_alpha``.
        lr: Learning rate of the matrices A.
        lr_ratio: Learning rate of the matrices B in multiples of it.
        quantization: ``Int8``, ``NF4``, or None for the base's own dtype.
        gradient_checkpointing: Whether activations are recomputed.
        offload_encoders: Whether VAE and text encoders wait in host memory.
        offload_blocks: Whether the denoiser's blocks wait in host memory.
        offload_folder: Folder for them if host memory cannot hold them.
        draws: Whether images are drawn while training.
        vae_tiling: Whether the VAE decodes large images in tiles.
        why: The choices with their reasons.
    """

    resolution: int
    buckets: bool
    val_samples: int
    batch_size: int
    accumulate: int
    steps: int
    rank: int
    lr: float
    lr_ratio: float = 8.0
    quantization: str | None = None
    gradient_checkpointing: bool = False
    offload_encoders: bool = False
    offload_blocks: bool = False
    offload_folder: str | None = None
    draws: bool = True
    vae_tiling: bool = False
    why: Sequence[Choice] = field(default=())

    def changed(self, changes: dict[str, Any]) -> Settings:
        """The same settings with some changed; ``batch_size`` keeps the images of an optimizer step."""
        if "batch_size" in changes:
            size = min(changes["batch_size"], self.batch_size)
            changes = changes | {"batch_size": size, "accumulate": self.batch_size * self.accumulate // size}
        return replace(self, **changes)


AS_GIVEN = "as given"
"""Reason for a value that the user gives."""

KEYS = {
    "data.init_args.resolution": "resolution",
    "data.init_args.val_samples": "val_samples",
    "data.init_args.batch_size": "batch_size",
    "trainer.accumulate_grad_batches": "accumulate",
    "trainer.max_steps": "steps",
    "model.adapter.init_args.r": "rank",
    "model.optimizer.init_args.lr": "lr",
}
"""Config keys whose values the user may give, and the settings that they are."""


def given_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the values that the user gives by config key, by the names of :class:`Settings`.

    Raises:
        UserError: If a value is no number or no whole one, or too small.
    """
    found = {name: given[key] for key, name in KEYS.items() if key in given}
    for key, name in KEYS.items():
        if name in found:
            value, least = found[name], {"val_samples": 0, "lr": 0}.get(name, 1)
            if value is None or (name == "lr" and (not isinstance(value, int | float) or isinstance(value, bool))):
                raise UserError(f"{key}={value!r} is not a number; give one, or leave it out")
            check = check_least if name == "lr" else check_whole
            check(least, **{key: value})
    return found


def choose(base: Base, images: Images, given: dict[str, Any]) -> Settings:
    """The settings of a run, before memory is looked at.

    Args:
        base: Base of the run.
        images: Images to train on.
        given: Values of settings that the user gives, by their names; they are taken as they are.

    Raises:
        UserError: If the images are too small.
    """
    resolution = given.get("resolution") or _resolution(base, images)
    counts = [len(images)]
    if resolution % _DIVISOR == 0 and not base.is_embedded:
        counts = images.in_buckets(resolution, AspectRatioBuckets(_DIVISOR))
    usual = max(1, min(16, len(images) // 10)) if len(images) >= _LEAST_HELD_OUT else 0
    held_out = given.get("val_samples", usual)
    count = max(1, len(images) - held_out)
    together = _together(base, count)
    batch_size = given.get("batch_size") or _batch_size(together, counts)
    accumulate = given.get("accumulate") or max(1, round(together / batch_size))
    together = batch_size * accumulate
    steps = given.get("steps") or _steps(count, together)
    rank = given.get("rank") or (16 if count <= 1000 else 32)
    settings = Settings(
        resolution=resolution,
        buckets=len(counts) > 1,
        val_samples=held_out,
        batch_size=batch_size,
        accumulate=accumulate,
        steps=steps,
        rank=rank,
        lr=given.get("lr") or float(base.template["model"]["optimizer"]["init_args"]["lr"]),
    )
    return replace(settings, why=_reasons(base, images, settings, counts, given))


def _reasons(
    base: Base, images: Images, settings: Settings, counts: Sequence[int], given: dict[str, Any]
) -> tuple[Choice, ...]:
    count = len(images) - settings.val_samples
    # A pass ends with a batch of each bucket that may not be full; which of them lose images to validation is not known here.
    learned = count * images.repeats / len(images)
    batches = sum(math.ceil(one * learned / settings.batch_size) for one in counts)
    passes = passes_in(settings.steps, max(1, batches), settings.accumulate)
    repeated = "" if images.repeats == 1 else " with the repeats of the sets"
    edge = settings.resolution

    def why(name: str, reason: str) -> str:
        return AS_GIVEN if name in given else reason

    usual = f"usual for {base.name}"
    smaller = f"the median image has the area of {images.edge} x {images.edge} px"
    shapes = "images keep about their aspect ratio" if settings.buckets else "all images are about square"
    if base.is_embedded:
        shapes = f"{base.name} draws squares; the rest is cut off"
    usual_rank = "usual; 32 for more than 1,000 images" if settings.rank == 16 else "usual for more than 1,000 images"
    data = "data.init_args"
    return (
        Choice(
            "images",
            f"{count:,} + {settings.val_samples}",
            why(
                "val_samples",
                "a tenth, at most 16, is held out for validation"
                if settings.val_samples
                else f"none is held out for validation of fewer than {_LEAST_HELD_OUT}",
            ),
            f"{data}.val_samples",
        ),
        Choice("size", f"{edge} px", why("resolution", usual if edge == base.size else smaller), f"{data}.resolution"),
        Choice("shapes", f"{len(counts)} buckets" if settings.buckets else "square", shapes, f"{data}.buckets"),
        Choice(
            "step",
            f"{settings.batch_size} x {settings.accumulate} images",
            why("batch_size", f"an eighth of the images, at most {_most(base)}"),
            f"{data}.batch_size",
        ),
        Choice(
            "steps",
            f"{settings.steps:,}",
            why("steps", f"{passes:.3g} passes{repeated}: 400 x the root of the images"),
            "trainer.max_steps",
        ),
        Choice("rank", f"{settings.rank}", why("rank", usual_rank), "model.adapter"),
        Choice(
            "rate",
            f"{settings.lr:g}",
            why("lr", f"usual; {settings.lr_ratio:g} times as much for matrices B (LoRA+)"),
            "model.optimizer",
        ),
    )


def _resolution(base: Base, images: Images) -> int:
    """The base's usual size, or less if half of the images have less; at least half of it."""
    divisor = min(_DIVISOR, base.size)
    if images.edge < base.size / 2:
        raise UserError(
            f"the images are too small for {base.name}: the median has the area of {images.edge} x {images.edge} px, less than "
            f"{base.size // 2} x {base.size // 2}; take larger images or a smaller base, or give --data.init_args.resolution"
        )
    return min(base.size, max(divisor, images.edge // divisor * divisor))


def _most(base: Base) -> int:
    """Most images in an optimizer step."""
    return 16 if base.is_embedded else 4


def _together(base: Base, count: int) -> int:
    """Images in an optimizer step: a power of two, so that a pass has at least eight steps."""
    return int(min(_most(base), 2 ** int(math.log2(max(1, count / 8)))))


def _batch_size(together: int, counts: Sequence[int]) -> int:
    """The largest batch that every bucket fills and that leaves few images out: a batch takes its images from one bucket."""

    def suits(size: int) -> bool:
        return min(counts) >= size and sum(count % size for count in counts) <= _DROPPED * sum(counts)

    return next(size for size in (together // 2**halving for halving in range(10)) if size <= 1 or suits(size))


def _steps(count: int, together: int) -> int:
    """Steps in which 400 times the root of the number of images are seen: 90 passes over 20 images, 13 over 1,000."""
    steps = round(400 * math.sqrt(count) / together, -1)
    return int(max(_STEPS[0], min(_STEPS[1], steps)))
