"""A family against its own pipeline: exact predictions give exact latents, and an over-fitted image is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.families import ModelFamily
from tests.helpers import make_batches

Convert = Callable[[Tensor], Tensor]


def same(tensor: Tensor) -> Tensor:
    """For denoisers that take latents as they are."""
    return tensor


@contextmanager
def answering(denoiser: Any, answer: Tensor) -> Iterator[list[Tensor]]:
    """A context in which the denoiser gives one answer for every sample; its value lists the timesteps that it gets."""
    times: list[Tensor] = []

    def forward(*args: Any, timestep: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        times.append(timestep)
        sample = answer.expand(len(timestep), *answer.shape[1:])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    denoiser.forward = forward
    try:
        yield times
    finally:
        del denoiser.forward


def draw_latents(pipeline: Any, family: ModelFamily, prompt: str, size: int, **options: Any) -> Tensor:
    """Latents that the family's pipeline draws without guidance, as its denoiser takes them."""
    options = {"generator": [torch.Generator().manual_seed(7)], "height": size, "width": size} | options
    inputs = {"guidance_scale": 1.0} | family.prompt_inputs([prompt], 1.0)
    drawn: Tensor = pipeline(**inputs, output_type="latent", **options).images
    return drawn


def check_exact_prediction(
    family: ModelFamily,
    start: Tensor,
    latents: Tensor,
    target: Tensor,
    to_model: Convert = same,
    to_answer: Convert | None = None,
    to_drawn: Convert | None = None,
    size: int = 16,
) -> None:
    """The exact prediction leads the pipeline from ``start`` to ``latents``, and is what :meth:`denoise` gives at equal times.

    Args:
        family: Loaded family.
        start: Latents at the beginning of sampling, ``(1, *latent_shape)``.
        latents: Latents that sampling should give, of the same shape.
        target: Exact prediction, of the same shape.
        to_model: Function from latents to what the pipeline takes as latents.
        to_answer: Function from the prediction to what the denoiser gives; defaults to ``to_model``.
        to_drawn: Function from latents to those that the pipeline gives; defaults to ``to_model``.
        size: Edge of the image in pixels.
    """
    batch = make_batches(1, size=size)[0]
    _, conditioning = family.encode(batch, Draws(0, batch["slot"]))
    pipeline = family.pipeline()
    with answering(family.denoiser, (to_answer or to_model)(target)) as times:
        drawn = draw_latents(pipeline, family, "a star", size, latents=to_model(start), num_inference_steps=3)
        torch.testing.assert_close(drawn, (to_drawn or to_model)(latents), rtol=1e-4, atol=1e-4)
        in_pipeline = [time[0].float() for time in times]
        times.clear()
        for time in pipeline.scheduler.timesteps:
            prediction = family.denoise(start.expand(2, *start.shape[1:]), time.expand(2).float(), conditioning)
            torch.testing.assert_close(prediction, target.expand_as(prediction), rtol=0, atol=0)
    torch.testing.assert_close([time[0] for time in times], in_pipeline)


def overfit(
    family: ModelFamily, steps: int, lr: float, to_model: Convert = same, size: int = 16, count: int = 8
) -> float:
    """Train all of the denoiser on one image, ``count`` times in each step, and draw it.

    Returns:
        Relative error of the latents that the pipeline draws.
    """
    torch.manual_seed(0)
    objective = family.default_objective()
    objective.prepare(family.scheduler_config)
    one = make_batches(1, size=size)[0]
    batch = {"pixel_values": one["pixel_values"][:1].expand(count, -1, -1, -1), "caption": one["caption"][:1] * count}
    with torch.no_grad():
        latents, conditioning = family.encode(batch, Draws(0, [0] * count))
    family.denoiser.requires_grad_(True)
    optimizer = torch.optim.Adam(family.denoiser.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        draws = Draws(0, range(count * step, count * (step + 1)))
        sample = objective.sample(latents, draws, family.num_tokens(latents.shape[1:]))
        objective.loss(family.denoise(sample.noisy, sample.timesteps, conditioning), sample).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    drawn = draw_latents(family.pipeline(), family, one["caption"][0], size, num_inference_steps=8)
    wanted = to_model(latents[:1])
    return float((drawn - wanted).norm() / wanted.norm())
