"""``lit-lora prior``: images of the class, drawn by the base, for prior preservation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_lora.errors import UserError, check_least, check_most
from lit_lora.prompts import MOST_SEED

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def prior_command(arguments: list[str]) -> None:
    """Run ``lit-lora prior``."""
    from lit_lora.tools import run_tool
    from lit_lora.tools.sample import list_arguments

    own = list_arguments(arguments, PriorOptions, lists=("--prompts",))
    options: PriorOptions = run_tool(PriorOptions, own, "lit-lora prior", return_instance=True)
    from lit_lora.tools.class_images import draw_class_images

    draw_class_images(options)


@dataclass(frozen=True)
class PriorOptions:
    """Draw images of the class with the base and pack them into shards, for PriorPreservation with class_keys: class/*.

    The same command goes on where a run that was stopped or killed has ended.

    Args:
        out: Folder for the images (images/class) and the shards (shards).
        base: Folder, hub id, .safetensors file or "embedded": the base that will be trained.
        prompts: One text such as "a photo of a dog", several, or a file of prompts, as of lit-lora sample; taken in turn.
        count: Number of images.
        negative_prompt: Text to draw away from, for prompts without one; defaults to none.
        seed: Seed of the first image; image i is drawn from seed + i.
        steps: Number of denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off.
        height: Height of the images in pixels; defaults to the model's own.
        width: Width of the images in pixels; defaults to the model's own.
        batch_size: Number of images that are drawn at a time.
        scheduler: Class of the scheduler in diffusers; defaults to the base's own.
        dtype: dtype of the base model.
        device: Device to draw on; defaults to the first GPU, or to the CPU if there is none.
        family: Model family of the base; defaults to the family for the base's pipeline.
        revision: Branch, tag or commit of a base on the hub; defaults to the hub's default branch.
        variant: Variant of the base's weight files, such as fp16; defaults to files without one, or to the only one there is.

    Raises:
        UserError: If base or prompts are missing, or an option is out of its bounds.
    """

    out: str
    base: str | None = None
    prompts: str | list[str] | None = None
    count: int = 200
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 5.0
    height: int | None = None
    width: int | None = None
    batch_size: int = 4
    scheduler: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    family: str | None = None
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError('give --prompts: a text for the class, such as "a photo of a dog", or a file of prompts')
        if not self.base:
            raise UserError("give --base: the folder, hub id or file of the base that will be trained, or 'embedded'")
        check_least(1, count=self.count, steps=self.steps, batch_size=self.batch_size)
        check_least(0, seed=self.seed)
        check_most(MOST_SEED, seed=self.seed)
