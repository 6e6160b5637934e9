"""The properties of a run on which its memory depends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from lit_lora.errors import UserError, check_least
from lit_lora.module import LoraDiffusion
from lit_lora.planning.denoiser_traces import DenoiserTraces
from lit_lora.planning.device import Device, find_device
from lit_lora.planning.processes import Processes
from lit_lora.prompts import Prompt, prompt_groups
from lit_lora.sampling import IMAGES_AT_A_TIME


@dataclass(frozen=True)
class Sampling:
    """Images that are drawn while training.

    Args:
        images: Number of images in a batch; defaults to 1.
        guidance_scale: Scale of classifier-free guidance; defaults to 5.
        height: Height in pixels; defaults to the model's own.
        width: Width in pixels; defaults to the model's own.
        own_size: Whether there are also images of the model's own size; defaults to False.
    """

    images: int = 1
    guidance_scale: float = 5.0
    height: int | None = None
    width: int | None = None
    own_size: bool = False

    @classmethod
    def of(cls, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> Self:
        """The images that :class:`SampleImages` draws with these prompts and options: the largest batch, scale and size."""
        groups = prompt_groups(prompts, options)
        images = min(IMAGES_AT_A_TIME, max(len(group.places) for group in groups))
        scale = max(group.options["guidance_scale"] for group in groups)
        edges = [[group.options[edge] for group in groups] for edge in ("height", "width")]
        height, width = (max(filter(None, sizes), default=None) for sizes in edges)
        return cls(images, scale, height, width, own_size=any(None in sizes for sizes in edges))

    def size(self, own: int) -> tuple[int, int]:
        """Largest height and width of an image.

        Args:
            own: Edge of images of the model's own size, in pixels.
        """
        least = own if self.own_size else 0
        return max(self.height or own, least), max(self.width or own, least)


@dataclass(frozen=True)
class Run:
    """A run to plan.

    Args:
        module: Module to train, loaded or not; it does not change.
        batch_size: Samples in a batch of one process.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        device: Device that trains; defaults to the CPU of this machine.
        accumulate_grad_batches: Batches per optimizer step; defaults to 1.
        gradient_clip_val: Norm to which the trainer clips gradients; defaults to no clipping by norm. The value does not matter.
        precision: Precision of the trainer; defaults to ``32-true``.
        cached: Kinds of data that batches take from a cache, of ``"latents"`` and ``"text"``; defaults to none.
        cacheable: Kinds that ``lit-lora cache`` could encode beforehand; defaults to none.
        cache_keys: Config keys that such a cache needs, with their values; defaults to none.
        averaged: Whether a moving average of the adapter is kept; defaults to False.
        validation: Whether the run validates, in batches of the same size; defaults to False.
        sampling: Images that are drawn while training; defaults to none.
        processes: Processes that train together, of which one is planned; defaults to a single one.
        leaves_out_start: Whether a callback lets the files leave out first values of LoRA, so that they have twice the rank;
            defaults to False. What ``init_lora_weights`` leaves out is known without.
        traces: What plans of this run have found out about its denoiser, for those of runs that are made from it with
            :func:`~dataclasses.replace`; defaults to nothing.

    Raises:
        UserError: If a number is too small, or ``cached`` holds anything else.
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
    cacheable: frozenset[str] = frozenset()
    cache_keys: Mapping[str, Any] = field(default_factory=dict)
    averaged: bool = False
    validation: bool = False
    sampling: Sampling | None = None
    processes: Processes = field(default_factory=Processes)
    leaves_out_start: bool = False
    traces: DenoiserTraces = field(default_factory=DenoiserTraces, repr=False, compare=False)

    @property
    def denoiser_options(self) -> tuple[Any, ...]:
        """Everything beside the module that the memory and the work of the denoiser's part depend on."""
        size = self.batch_size, self.height, self.width, self.device.is_cuda, self.cached
        step = self.accumulate_grad_batches, self.gradient_clip_val is None, self.precision, self.averaged
        return *size, *step, self.sampling, self.leaves_out_start, self.processes

    @property
    def sampling_options(self) -> tuple[Any, ...]:
        """Those of :attr:`denoiser_options` on which drawing images depends."""
        return self.device.is_cuda, self.precision, self.sampling, self.processes

    def __post_init__(self) -> None:
        check_least(1, batch_size=self.batch_size, accumulate_grad_batches=self.accumulate_grad_batches)
        check_least(8, height=self.height, width=self.width)
        unknown = self.cached - {"latents", "text"}
        if unknown:
            raise UserError(f"cached={sorted(self.cached)} holds {min(unknown)!r}; choose from latents and text")
