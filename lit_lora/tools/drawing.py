"""Draws images with a base model and an adapter, through the base's model family or its diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

import lit_lora
from lit_lora.adapters import check_finite
from lit_lora.embedded import resolve
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, ModelSource, check_size, family_of
from lit_lora.formats.peft import WEIGHTS, read_tensors
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
    disable_progress_bar()  # of transformers, one for each text encoder
    adapt = None if adapter is None else partial(load_adapter, folder=Path(adapter), saved=read_adapter(Path(adapter)))
    if device is not None:
        _check_device(device)
    kind = _family_class(family, base)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments = (base, adapt, getattr(torch, dtype), device)
    return _from_pipeline(*arguments, config) if kind is None else _from_family(kind, *arguments, size)


def _from_family(
    kind: type[ModelFamily],
    base: str,
    adapt: Callable[[nn.Module], None] | None,
    dtype: torch.dtype,
    device: str,
    size: tuple[int | None, int | None],
) -> Callable[..., list[Image.Image]]:
    """Function that draws with a base of a known family and the adapter; the size is checked before weights are read."""
    family = kind(base)
    family.read_configs()
    check_size(family, *(edge or family.default_size for edge in size))
    family.load(dtype)
    if adapt:
        adapt(family.denoiser)
    return family.to(device).generate


def _from_pipeline(
    base: str, adapt: Callable[[nn.Module], None] | None, dtype: torch.dtype, device: str, config: Mapping[str, Any]
) -> Callable[..., list[Image.Image]]:
    """Function that draws with a base of no known family, through its diffusers pipeline, and the adapter."""
    try:
        pipeline = DiffusionPipeline.from_pretrained(resolve(base), dtype=dtype)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot load the base {base!r}: {error}") from error
    if adapt:
        adapt(_adapted_part(pipeline, config))
    pipeline.set_progress_bar_config(disable=True)
    return partial(generate, pipeline.to(device))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's PEFT files.

    Raises:
        UserError: If the file is missing or damaged, or values are NaN or Inf.
    """
    tensors = read_tensors(folder / WEIGHTS)
    check_finite(tensors, f"adapter {folder}", "use the adapter of an earlier checkpoint")
    return tensors


def load_adapter(model: nn.Module, folder: Path, saved: Mapping[str, Tensor]) -> None:
    """Load an adapter into a model, in place.

    Args:
        model: The denoiser.
        folder: Folder with the adapter's PEFT files.
        saved: Tensors of the adapter.

    Raises:
        UserError: If the adapter does not fit the model, or tensors are missing or unknown.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[:2]
        raise UserError(
            f"the adapter {folder} does not fit {type(model).__name__}: {' '.join(reason) or type(error).__name__}; set "
            f"--base to the base that it was trained on"
        ) from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    for what, names in (("misses", expected - saved.keys()), ("has unknown", saved.keys() - expected)):
        if names:
            raise UserError(
                f"the adapter {folder} {what} {len(names)} tensors, the first is {min(names)}; its file is incomplete or of "
                f"another adapter than its adapter_config.json"
            )


def _check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device={device!r} cannot be used here ({reason}); use cpu, or leave it out") from error


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
