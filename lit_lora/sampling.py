"""Draws images with a diffusers pipeline, each from its own seed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor
from torchvision.utils import make_grid

from lit_lora.argument_types import check_types
from lit_lora.cut_prompts import cut_prompts_told
from lit_lora.errors import UserError, check_least, check_most, check_whole
from lit_lora.unknown_tokens import warn_of_unknown_tokens

IMAGES_AT_A_TIME = 16
"""Default number of images in a batch."""

PromptInputs = Callable[[list[str], float], dict[str, Any]]
"""Function from prompts and a guidance scale to the pipeline's arguments: see :meth:`ModelFamily.prompt_inputs`."""


class NonFiniteImageError(UserError):
    """An image holds NaN."""


def text_prompts(prompts: list[str], guidance_scale: float) -> dict[str, Any]:
    """Arguments of a pipeline that takes its prompts as texts, as most do."""
    return {"prompt": prompts}


@dataclass(frozen=True)
class SamplingOptions:
    """Options for drawing images.

    Args:
        num_inference_steps: Number of denoising steps; defaults to 25.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off. Defaults to 5.
        guidance_rescale: Fraction by which guided predictions are rescaled to the standard deviation of unguided ones, in
            [0, 1] (Lin et al., 2023, arXiv 2305.08891): against overexposed images of bases whose schedule ends in pure
            noise, for which the paper uses 0.7. For Stable Diffusion 1.x, 2.x and XL. Defaults to 0.

    Raises:
        UserError: If ``num_inference_steps`` is below 1, ``guidance_scale`` below 0, or ``guidance_rescale`` outside [0, 1].
    """

    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_whole(1, num_inference_steps=self.num_inference_steps)
        check_least(0, guidance_scale=self.guidance_scale, guidance_rescale=self.guidance_rescale)
        check_most(1, guidance_rescale=self.guidance_rescale)


def check_guidance_rescale(pipeline_class: type[DiffusionPipeline], guidance_rescale: float) -> None:
    """Check that a pipeline can rescale its guided predictions.

    Raises:
        UserError: If it cannot, and ``guidance_rescale`` is not 0.
    """
    if guidance_rescale and "guidance_rescale" not in inspect.signature(pipeline_class.__call__).parameters:
        raise UserError(
            f"guidance_rescale={guidance_rescale}: {pipeline_class.__name__} has no such option; leave it at 0"
        )


def check_negative_prompts(
    pipeline_class: type[DiffusionPipeline], negatives: Sequence[str], guidance_scale: float, guided: bool | None = None
) -> None:
    """Check that negative prompts have an effect on what a pipeline draws.

    Args:
        pipeline_class: Class of the pipeline.
        negatives: Negative prompts; empty ones need no effect.
        guidance_scale: Scale of classifier-free guidance.
        guided: Whether the pipeline draws with it; defaults to whether the scale is above 1.

    Raises:
        UserError: If they have none.
    """
    if not any(negatives):
        return
    name, own = pipeline_class.__name__, inspect.signature(pipeline_class.__call__).parameters
    if not own.keys() & {"negative_prompt", "negative_prompt_embeds"}:
        raise UserError(f"{name} takes no negative prompt; leave it out")
    if not (guidance_scale > 1 if guided is None else guided):
        action = "leave it out" if guidance_scale > 1 else "set guidance_scale above 1, or leave it out"
        raise UserError(
            f"{name} draws without classifier-free guidance at guidance_scale={guidance_scale}, so that a negative prompt has no "
            f"effect; {action}"
        )


@torch.inference_mode(False)  # a denoiser may keep tensors that it computes here, and training uses them later
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
    guidance_rescale: float = 0.0,
    negative_prompts: Sequence[str] = (),
    guided: bool | None = None,
    sources: Sequence[Image.Image] = (),
    pipeline_options: Mapping[str, Any] = MappingProxyType({}),
    offload_from: torch.device | None = None,
) -> list[Image.Image]:
    """Draw one image for each prompt; a warning tells words such as ``<cat-toy>`` that the pipeline does not know as a token.

    Args:
        pipeline: Text-to-image pipeline.
        prompts: Prompts to draw.
        seeds: Seeds of the initial noise, one for each prompt. Noise is drawn on the CPU, so that an image is the same on
            every device, up to rounding.
        num_inference_steps: Number of denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off. It is the pipeline's ``guidance_scale`` unless
            ``prompt_inputs`` gives another.
        height: Height in pixels; defaults to the pipeline's own.
        width: Width in pixels; defaults to the pipeline's own.
        batch_size: Number of images in a batch; defaults to 16.
        prompt_inputs: Function that gives the pipeline's arguments for prompts; defaults to :func:`text_prompts`.
        guidance_rescale: See :class:`SamplingOptions`; defaults to 0.
        negative_prompts: Texts to draw away from, one for each prompt; defaults to none.
        guided: Whether the pipeline draws with classifier-free guidance; defaults to whether ``guidance_scale`` is above 1.
        sources: Images to edit, one for each prompt, which are resized to cover the size that is drawn and cropped at the
            center. Defaults to none. They need ``height`` and ``width``.
        pipeline_options: Further arguments of the pipeline; defaults to none.
        offload_from: GPU on which the pipeline's models, all of which are in host memory, take turns. Defaults to None: they
            compute where they are.

    Raises:
        UserError: If the pipeline cannot rescale its guided predictions, takes no negative prompts, or has a scheduler with fewer
            steps, or an image holds NaN.
    """
    check_guidance_rescale(type(pipeline), guidance_rescale)
    check_negative_prompts(type(pipeline), negative_prompts, guidance_scale, guided)
    warn_of_unknown_tokens([*prompts, *negative_prompts], getattr(pipeline, "components", {}))
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        drawn = prompts[start : start + batch_size]
        with warnings.catch_warnings(), cut_prompts_told(pipeline, drawn), _taking_turns(pipeline, offload_from):
            warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)  # NaN as a byte
            try:
                inputs = prompt_inputs(list(drawn), guidance_scale)
                inputs |= _negative_inputs(negative_prompts[start : start + batch_size], prompt_inputs)
                inputs |= _source_inputs(sources[start : start + batch_size], height, width)
                images += pipeline(
                    **{"guidance_scale": guidance_scale} | inputs,
                    num_inference_steps=num_inference_steps,
                    height=height,
                    width=width,
                    generator=generators,
                    **({"guidance_rescale": guidance_rescale} if guidance_rescale else {}),
                    **pipeline_options,
                ).images
            except RuntimeWarning as warning:
                raise NonFiniteImageError(
                    f"an image from {prompts[start]!r} on holds NaN: the weights of base or adapter are NaN or Inf, or values "
                    f"overflow in {pipeline.dtype}; use another checkpoint, or bfloat16 or float32"
                ) from warning
            except ValueError as error:
                if "num_inference_steps" not in str(error):
                    raise
                config = pipeline.scheduler.config
                steps = (
                    config.get("original_inference_steps") or config.num_train_timesteps
                )  # the former of LCM and TCD
                raise UserError(
                    f"num_inference_steps={num_inference_steps} is too large for {type(pipeline.scheduler).__name__}; draw with "
                    f"at most {steps} steps"
                ) from error
    return images


@contextmanager
def _taking_turns(pipeline: DiffusionPipeline, device: torch.device | None) -> Iterator[None]:
    """A context in which a pipeline's models go to a device one after another; None leaves them where they are."""
    if device is None:
        yield
        return
    models = [
        vars(one) for one in pipeline.components.values() if isinstance(one, nn.Module) and "forward" not in vars(one)
    ]
    pipeline.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        pipeline.remove_all_hooks()
        for attributes in models:
            attributes.pop(
                "forward", None
            )  # accelerate leaves a cycle, which would keep a base that another one replaces
        pipeline.to("cpu", silence_dtype_warnings=True)


def _negative_inputs(negatives: Sequence[str], prompt_inputs: PromptInputs) -> dict[str, Any]:
    """A pipeline's arguments for negative prompts: those for prompts, whether texts or embeddings, with ``negative_`` before."""
    if not any(negatives):
        return {}
    inputs = prompt_inputs(list(negatives), 1.0).items()
    return {f"negative_{name}": value for name, value in inputs if name.startswith(("prompt", "pooled_prompt"))}


def _source_inputs(sources: Sequence[Image.Image], height: int | None, width: int | None) -> dict[str, Any]:
    """A pipeline's arguments for images to edit, float32 in [0, 1], ``(B, 3, height, width)``."""
    if not sources:
        return {}
    assert height is not None, "sources are framed to the size that is drawn"
    assert width is not None, "sources are framed to the size that is drawn"
    framed = [ImageOps.fit(one.convert("RGB"), (width, height), Image.Resampling.BICUBIC) for one in sources]
    return {"image": torch.stack([pil_to_tensor(one).float() / 255 for one in framed])}


def image_grid(images: Sequence[Image.Image], columns: int) -> Tensor:
    """Arrange images in rows: float32 in [0, 1], ``(3, H, W)``; smaller images are centred on black.

    Args:
        images: Images.
        columns: Number of images in a row.
    """
    size = [max(image.height for image in images), max(image.width for image in images)]
    return make_grid([center_crop(pil_to_tensor(image).float() / 255, size) for image in images], nrow=columns)
