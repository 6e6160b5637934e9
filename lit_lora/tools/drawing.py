"""Draws images with a base model and an adapter, through the base's model family or its diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from PIL import Image

import lit_lora
from lit_lora.embedded import resolve
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, ModelSource, check_size, family_of
from lit_lora.sampling import generate


def make_generate(
    base: str,
    config: Mapping[str, Any],
    *,
    adapter: str | None,
    family: str | None,
    dtype: str,
    device: str | None,
    size: tuple[int | None, int | None],
) -> Callable[..., list[Image.Image]]:
    """Load base and adapter, and return a function like :func:`lit_lora.sampling.generate` without its pipeline.

    Args:
        base: Folder, hub id or ``embedded``.
        config: PEFT config of the adapter; empty without an adapter.
        adapter: Folder of the adapter; None for the base alone.
        family: Name or import path of the base's model family; None for the family of the base's pipeline.
        dtype: Name of the base's dtype.
        device: Device to draw on; None for the first GPU, or for the CPU if there is none.
        size: Height and width of the images in pixels; None for the model's own.

    Raises:
        UserError: If base or adapter cannot be loaded, or the family cannot draw images of this size.
    """
    kind = _family_class(family, base)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments = (base, adapter, getattr(torch, dtype), device)
    return _from_pipeline(*arguments, config) if kind is None else _from_family(kind, *arguments, size)


def _from_family(
    kind: type[ModelFamily],
    base: str,
    adapter: str | None,
    dtype: torch.dtype,
    device: str,
    size: tuple[int | None, int | None],
) -> Callable[..., list[Image.Image]]:
    """Function that draws with a base of a known family and the adapter; the size is checked before weights are read."""
    family = kind(base)
    family.read_configs()
    check_size(family, *(edge or family.default_size for edge in size))
    family.load(dtype)
    if adapter:
        PeftModel.from_pretrained(family.denoiser, adapter)  # in place
    return family.to(device).generate


def _from_pipeline(
    base: str, adapter: str | None, dtype: torch.dtype, device: str, config: Mapping[str, Any]
) -> Callable[..., list[Image.Image]]:
    """Function that draws with a base of no known family, through its diffusers pipeline, and the adapter."""
    try:
        pipeline = DiffusionPipeline.from_pretrained(resolve(base), dtype=dtype)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot load the base {base!r}: {error}") from error
    if adapter:
        PeftModel.from_pretrained(_adapted_part(pipeline, config), adapter)
    pipeline.set_progress_bar_config(disable=True)
    return partial(generate, pipeline.to(device))


def _family_class(family: str | None, base: str) -> type[ModelFamily] | None:
    """The family of this name or import path, or the one for the base's pipeline; None if there is none."""
    if family is None:
        return family_of(str(ModelSource(base).index().get("_class_name")))
    path, _, name = family.rpartition(".")
    try:
        kind = getattr(import_module(path) if path else lit_lora, name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"family={family!r} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, ModelFamily)):
        raise UserError(f"family={family!r} is not a subclass of lit_lora.ModelFamily")
    return kind


def _adapted_part(pipeline: Any, config: Mapping[str, Any]) -> Any:
    """The part of a pipeline that an adapter was made for, whose class PEFT's config names."""
    wanted = (config.get("auto_mapping") or {}).get("base_model_class")
    components = pipeline.components
    if wanted is None:
        parts = [components[name] for name in ("transformer", "unet") if name in components]
    else:
        parts = [part for part in components.values() if type(part).__name__ == wanted]
    if not parts:
        raise UserError(
            f"the adapter was made for a {wanted}, which {type(pipeline).__name__} does not have; set --base to the "
            f"base that the adapter was trained on"
        )
    return parts[0]
