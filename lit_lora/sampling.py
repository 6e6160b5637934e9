"""Images from a diffusers pipeline, one seed each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import make_grid

from lit_lora.errors import check_least

IMAGES_AT_A_TIME = 16
"""Default number of images that are drawn together."""

PromptInputs = Callable[[list[str], float], dict[str, Any]]
"""The pipeline's arguments for prompts and a guidance scale: see :meth:`ModelFamily.prompt_inputs`."""


def text_prompts(prompts: list[str], guidance_scale: float) -> dict[str, Any]:
    """Prompts as most pipelines take them."""
    return {"prompt": prompts}


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn.

    Args:
        num_inference_steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off.

    Raises:
        UserError: If there are no denoising steps.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 5.0

    def __post_init__(self) -> None:
        check_least(1, num_inference_steps=self.num_inference_steps)


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = IMAGES_AT_A_TIME,
    prompt_inputs: PromptInputs = text_prompts,
) -> list[Image.Image]:
    """One image for each prompt.

    Args:
        pipeline: Text-to-image pipeline.
        prompts: Prompts to draw.
        seeds: Seeds of the initial noise, one for each prompt; it is drawn on the CPU, so that an image is the same on any
            device up to rounding.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance scale of the pipeline; 1 turns classifier-free guidance off.
        height: Height in pixels; defaults to the model's own.
        width: Width in pixels; defaults to the model's own.
        batch_size: Number of images drawn together; defaults to 16.
        prompt_inputs: How the pipeline takes prompts; by default as texts.
    """
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        images += pipeline(
            **prompt_inputs(list(prompts[start : start + batch_size]), guidance_scale),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            generator=generators,
        ).images
    return images


def image_grid(images: Sequence[Image.Image], columns: int) -> Tensor:
    """Images of one size side by side: float32 in [0, 1], ``(3, H, W)``."""
    return make_grid([pil_to_tensor(image).float() / 255 for image in images], nrow=columns)
