"""Pictures from a diffusers pipeline, one seed each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import make_grid

from lit_lora.errors import check_least

PICTURES_AT_A_TIME = 16
"""As many as are drawn together unless somebody says otherwise."""


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
    batch_size: int = PICTURES_AT_A_TIME,
) -> list[Image.Image]:
    """One picture for each prompt.

    Args:
        pipeline: Any text-to-image pipeline.
        prompts: What to draw.
        seeds: Of the initial noise, one for each prompt; drawn on the CPU, so that a picture is the same on any device
            up to rounding.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 turns it off.
        height: In pixels; the model's own by default.
        width: In pixels; the model's own by default.
        batch_size: Pictures made at a time.
    """
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        images += pipeline(
            list(prompts[start : start + batch_size]),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            generator=generators,
        ).images
    return images


def image_grid(images: Sequence[Image.Image], columns: int) -> Tensor:
    """Pictures of one size side by side: float32 in [0, 1], ``(3, H, W)``."""
    return make_grid([pil_to_tensor(image).float() / 255 for image in images], nrow=columns)
