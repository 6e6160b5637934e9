"""Checks that base, family and objective match, before any weights are read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.families.base import ModelFamily
from lit_lora.families.source import ModelSource
from lit_lora.objectives import Objective

_CONTRACT = (
    "LoraDiffusion takes a dict with pixel_values, (B, 3, H, W), uint8 in [0, 255] or float in [-1, 1], and caption, a list of "
    "B strings; see lit_lora.families.Batch for all keys"
)


def prepare(family: ModelFamily, objective: Objective) -> dict[str, Any]:
    """Check that the base belongs to the family, and prepare the objective for the base's scheduler.

    Warns if the base is distilled to few steps.

    Args:
        family: Model family of the base, whose configs are read here if they were not read before.
        objective: Objective, which takes the base's noise schedule.

    Returns:
        Config of the scheduler to sample with.

    Raises:
        UserError: If a config cannot be read, the base belongs to another family, or the objective cannot train it.
    """
    _check_pipeline(family)
    family.read_configs()
    _check_denoiser(family)
    _check_vae(family)
    try:
        scheduler_config = objective.prepare(family.scheduler_config)
    except UserError as error:
        raise UserError(
            f"objective {type(objective).__name__} cannot train {type(family).__name__} {str(family.source)!r}: {error}. "
            f"Models of this family are trained with {family.default_objective.__name__}, which is the default"
        ) from error
    if family.is_distilled:
        warnings.warn(
            f"{str(family.source)!r} is distilled to few steps, and training undoes the distillation: train on "
            f"{family.undistilled}, and use the adapter with the distilled model",
            stacklevel=2,
        )
    return scheduler_config


def check_size(family: ModelFamily, height: int, width: int) -> None:
    """Check that a model of the family can be trained on images of this size.

    Args:
        family: Model family whose configs are read.
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Raises:
        UserError: If height or width is not a multiple of :attr:`ModelFamily.size_multiple`.
    """
    multiple = family.size_multiple
    if height % multiple or width % multiple or min(height, width) < multiple:
        nearest = [max(multiple, round(edge / multiple) * multiple) for edge in (height, width)]
        raise UserError(
            f"{type(family).__name__} takes images whose sides are multiples of {multiple} px, not {height} x {width}; "
            f"set resolution (and buckets.divisor) of the data, or height and width of drawn images, to such a size, for example "
            f"{nearest[0]} x {nearest[1]}"
        )


def check_batch(family: ModelFamily, batch: Any, values: bool) -> None:
    """Check that a batch is as :data:`Batch` says, whichever datamodule it comes from.

    Args:
        family: Model family that is trained.
        batch: Batch to check.
        values: Whether to look at the images' values too, for which the device has to be waited for.

    Raises:
        UserError: If a key is missing, a shape or a type is wrong, float images exceed [-1, 1], or there are embeddings of
            captions although text encoders are trained.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"the batch is a {type(batch).__name__}; {_CONTRACT}")
    images = "latents_mean" if "latents_mean" in batch else "pixel_values"
    text = "text_embeddings" if "text_embeddings" in batch else "caption"
    if missing := sorted({images, text} - batch.keys()):
        raise UserError(f"the batch has no {missing[0]}, only {', '.join(map(repr, batch)) or 'nothing'}; {_CONTRACT}")
    if text == "text_embeddings" and family.trained_encoders:
        raise UserError(
            f"the batch has text_embeddings, which frozen text encoders have computed, and "
            f"{' and '.join(family.trained_encoders)} of {type(family).__name__} are trained; give captions instead"
        )
    if images == "pixel_values":
        _check_images(family, batch["pixel_values"], values)
    count = len(batch[images])
    if text == "caption":
        captions = batch["caption"]
        if not isinstance(captions, list | tuple) or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"caption is {type(captions).__name__}, not a list of {count} strings; {_CONTRACT}")
        _check_count(count, caption=captions)
    _check_count(count, **{name: batch[name] for name in ("weight", "slot", "key") if name in batch})
    if "loss_mask" in batch:
        _check_mask(batch["loss_mask"], batch[images])
    for name, like in (("source_pixel_values", "pixel_values"), ("source_latents", "latents_mean")):
        if name in batch:
            _check_sources(family, name, batch[name], batch[images], like)


def _check_images(family: ModelFamily, images: Any, values: bool) -> None:
    if not isinstance(images, Tensor):
        raise UserError(f"pixel_values is a {type(images).__name__}, not a tensor; {_CONTRACT}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"pixel_values has the shape {tuple(images.shape)}, not (B, 3, H, W); {_CONTRACT}")
    check_size(family, *images.shape[-2:])
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise UserError(f"pixel_values is {images.dtype}; {_CONTRACT}")
    if not values:
        return
    least, most = (float(value) for value in torch.aminmax(images.detach()))
    if least < -1.01 or most > 1.01:
        raise UserError(f"pixel_values has values from {least:.3g} to {most:.3g}; {_CONTRACT}")
    if least >= 0:
        warnings.warn(
            f"no value of pixel_values is below 0, the largest is {most:.3g}: images in [0, 1] must become [-1, 1]",
            stacklevel=2,
        )


def _check_mask(mask: Any, images: Tensor) -> None:
    """Check the mask of the loss against images or latents, ``(B, …, H, W)``."""
    wanted = (len(images), 1, *images.shape[-2:])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != wanted:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise UserError(f"loss_mask is {found}, not a tensor {wanted}; {_CONTRACT}")


def _check_sources(family: ModelFamily, name: str, sources: Any, images: Tensor, like: str) -> None:
    """Check the source images of editing pairs, or their latents, against the target's, ``(B, …, H, W)``."""
    if not family.takes_sources:
        raise UserError(f"the batch has {name}, and {type(family).__name__} trains text to image; {editing_families()}")
    if not isinstance(sources, Tensor) or sources.shape != images.shape:
        found = tuple(sources.shape) if isinstance(sources, Tensor) else f"a {type(sources).__name__}"
        raise UserError(f"{name} is {found}, not a tensor {tuple(images.shape)} like {like}; {_CONTRACT}")


def check_edits(family: type[ModelFamily] | None) -> None:
    """Check that a family edits images that are given with a prompt.

    Args:
        family: The family; None for a base of no known family.

    Raises:
        UserError: If it does not.
    """
    if family is None or not family.takes_sources:
        name = "a base of no known family" if family is None else family.__name__
        raise UserError(
            f"a prompt has an image to edit, and {name} draws from text alone; leave image out: {editing_families()}"
        )


def editing_families() -> str:
    """What an error about editing pairs advises."""
    names = " or ".join(sorted(kind.__name__ for kind in families() if kind.takes_sources))
    return f"pairs are for the family {names}"


def _check_count(count: int, **lists: Any) -> None:
    for name, values in lists.items():
        if len(values) != count:
            raise UserError(f"{name} has {len(values)} entries for {count} images; {_CONTRACT}")


def family_of_source(source: ModelSource) -> type[ModelFamily] | None:
    """The family of a pipeline, or of the model in a file; None if there is none.

    Args:
        source: Source of the pipeline.

    Raises:
        UserError: If it cannot be read.
    """
    if (file := source.file) is not None and file.model_type is not None:
        return next((kind for kind in families() if file.model_type in kind.single_file_types), None)
    return family_of(str(source.index().get("_class_name")))


def check_single_file(family: ModelFamily) -> None:
    """Check that the base, if it is a file, is of the family.

    Args:
        family: Model family of the base.

    Raises:
        UserError: If the file is of another kind, or cannot be read.
    """
    file = family.source.file
    if file is None or file.model_type is None or not family.single_file_types:
        return
    if file.model_type not in family.single_file_types:
        other = family_of_source(family.source)
        advice = "use the text-to-image model" if other is None else f"use family {other.__name__}"
        raise UserError(
            f"{type(family).__name__} cannot train {file.path}, which is a model of the kind {file.model_type}, not "
            f"{' or '.join(sorted(family.single_file_types))}: {advice}"
        )


def family_of(pipeline_name: str) -> type[ModelFamily] | None:
    """The family for the diffusers pipeline class of this name; None if there is none."""
    return next((kind for kind in families() if pipeline_name in kind.pipelines()), None)


def families(kind: type[ModelFamily] = ModelFamily) -> Iterator[type[ModelFamily]]:
    """All model families that are imported, also those of other packages.

    Args:
        kind: Class whose subclasses to list; defaults to :class:`ModelFamily`.
    """
    for subclass in kind.__subclasses__():
        if hasattr(subclass, "pipeline_class"):
            yield subclass
        yield from families(subclass)


def _check_pipeline(family: ModelFamily) -> None:
    check_single_file(family)
    found = family.source.index().get("_class_name")
    if found is None or found in family.pipelines():
        return
    if found in family.image_pipelines:
        raise UserError(
            f"{type(family).__name__} cannot train {str(family.source)!r}, which is a {found}: it takes images as inputs, and "
            f"the family trains text to image; use the text-to-image model, such as {family.undistilled}"
        )
    other = family_of(found)
    if other is not None and (not isinstance(family, other) or family.takes_sources != other.takes_sources):
        raise UserError(
            f"{type(family).__name__} cannot train {str(family.source)!r}, which is a {found}: use family {other.__name__}"
        )


def _check_denoiser(family: ModelFamily) -> None:
    config, name = family.denoiser_config, f"the {family.denoiser_name} of {str(family.source)!r}"
    if config.get("_class_name") not in family.older_denoisers:
        _check_class(family, name, config, family.denoiser_class)
    found, expected = config.get("in_channels"), family.in_channels
    if found is not None and found != expected:
        raise UserError(
            f"{type(family).__name__} cannot train {name}: it takes {found} input channels, not {expected}, as models for "
            f"inpainting, editing or control do; use the text-to-image model, such as {family.undistilled}"
        )
    if further := family.further_inputs:
        raise UserError(
            f"{type(family).__name__} cannot train {name}: it is {further}; use the text-to-image model, such as "
            f"{family.undistilled}"
        )


def _check_vae(family: ModelFamily) -> None:
    _check_class(family, f"the VAE of {str(family.source)!r}", family.vae_config, family.vae_class)


def _check_class(family: ModelFamily, name: str, config: dict[str, Any], kind: type[Any]) -> None:
    found = config.get("_class_name", kind.__name__)
    if found != kind.__name__:
        raise UserError(f"{type(family).__name__} cannot train {name}: it is a {found}, not a {kind.__name__}")
