"""Draws images with a base model and an adapter, through the base's model family or its diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from transformers.utils.logging import disable_progress_bar

from lit_lora.adapters import load_adapter
from lit_lora.embedded import resolve
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, ModelSource, check_single_file, check_size, family_of_source
from lit_lora.formats import AdapterFiles
from lit_lora.formats.base_adapter import BaseAdapter
from lit_lora.formats.base_adapters import BaseAdapters, recorded_adapters
from lit_lora.formats.base_options import recorded_options
from lit_lora.formats.base_records import base_records
from lit_lora.formats.find import read_adapter
from lit_lora.formats.quantized_base import quantized_base, twice
from lit_lora.formats.sampling_scheduler import scheduler_changes
from lit_lora.formats.text_encoders import for_encoder
from lit_lora.quantization.weight_change import Changes
from lit_lora.sampling import generate
from lit_lora.tools.named_family import named_family


def make_generate(
    base: str | None,
    adapter: str | None,
    *,
    family: str | None,
    dtype: str,
    device: str | None,
    size: tuple[int | None, int | None],
    base_adapters: Sequence[str] = (),
    base_options: Mapping[str, str] | None = None,
) -> Callable[..., list[Image.Image]]:
    """Load base and adapter, and return a function like :func:`lit_lora.sampling.generate` without its pipeline.

    Args:
        base: Folder, hub id or ``embedded``; None for the base that the adapter names.
        adapter: File or folder of the adapter, in any format; None for the base alone.
        family: Name or import path of the base's model family; None for the family of the base's pipeline.
        dtype: Name of the base's dtype.
        device: Device to draw on; None for the first GPU, or for the CPU if there is none.
        size: Height and width of the images in pixels; None for the model's own.
        base_adapters: Paths of the adapters that the adapter was trained over; defaults to those that it names.
        base_options: Arguments of the family's constructor beside the base, such as ``variant``; of those that are not given,
            the adapter names the values of its training.

    Raises:
        UserError: If base or adapters cannot be loaded, the adapter does not name its base, or the family cannot draw images of
            this size.
    """
    disable_progress_bar()  # of transformers, one for each text encoder
    given = base_options or {}
    kind = _family_class(family, base, given)
    files = None if adapter is None else read_adapter(adapter, kind)
    if base is None:
        base = files.main_config.get("base_model_name_or_path") if files else None
        if not base:
            raise UserError("give --base: a folder, a hub id or 'embedded' (the adapter does not name its base)")
    options = {**(recorded_options(files.metadata, base) if files else {}), **given}
    kind = kind or _family_class(family, base, options)
    if device is not None:
        _check_device(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    records = base_records(files.metadata) if files else []
    if files and (quantization := quantized_base(files.metadata)):
        warnings.warn(twice(adapter, quantization), stacklevel=2)
    adapt = _Adapt(files, adapter, recorded_adapters(records, adapter, base_adapters, kind))
    arguments = (base, options, adapt, getattr(torch, dtype), device)
    return _from_pipeline(*arguments) if kind is None else _from_family(kind, *arguments, size)


class _Adapt:
    """Puts an adapter into the parts of a pipeline.

    Args:
        adapter: Adapter; None for none.
        path: Where it was read from, for errors.
        over: Adapters that it was trained over.
    """

    def __init__(self, adapter: AdapterFiles | None, path: str | None, over: Sequence[BaseAdapter] = ()) -> None:
        self.adapter, self.path, self.over = adapter, path, over

    @property
    def scheduler_changes(self) -> dict[str, Any]:
        """Entries of the base's scheduler config that the adapter needs changed."""
        return scheduler_changes(self.adapter.metadata) if self.adapter else {}

    def changes(self, family: type[ModelFamily] | None) -> Mapping[str, Changes]:
        """The changes of the base's weights by the adapters that this one was trained over.

        Args:
            family: Model family of the base; None for an unknown one.
        """
        if not self.over:
            return {}
        if family is None:
            raise UserError(
                f"{self.path} was trained over other adapters, which are merged into bases of known model families alone; name "
                f"the base's family with --family"
            )
        return BaseAdapters(self.over, family).changes()

    def __call__(self, denoiser: Callable[[Mapping[str, Any]], nn.Module], encoders: Mapping[str, Any]) -> None:
        """Load the adapter into the parts that it was made for, in place.

        Args:
            denoiser: Function that returns the denoiser for the adapter's PEFT config.
            encoders: Text encoders by name.

        Raises:
            UserError: If a part is missing, or the adapter does not fit it.
        """
        if self.adapter is None:
            return
        if self.adapter.state:
            load_adapter(denoiser(self.adapter.config), self.adapter.config, self.adapter.state, self.path)
        for name, part in self.adapter.text_encoders.items():
            if not isinstance(encoders.get(name), nn.Module):
                raise UserError(
                    f"the adapter {self.path} changes {name}, which the base does not have; set --base to its own base"
                )
            fitting = for_encoder(part, encoders[name])
            load_adapter(encoders[name], fitting.config, fitting.state, self.path)


def _from_family(
    kind: type[ModelFamily],
    base: str,
    options: Mapping[str, str],
    adapt: _Adapt,
    dtype: torch.dtype,
    device: str,
    size: tuple[int | None, int | None],
) -> Callable[..., list[Image.Image]]:
    """Function that draws with a base of a known family and the adapter; the size is checked before weights are read."""
    family = kind(base, **options)
    check_single_file(family)
    family.read_configs()
    check_size(family, *(edge or family.default_size for edge in size))
    family.load(dtype, changes=adapt.changes(kind))
    adapt(lambda config: family.denoiser, family.encoders)
    if adapt.adapter is not None and adapt.adapter.new_tokens:
        family.add_new_tokens(adapt.adapter.new_tokens)
    changes = adapt.scheduler_changes
    scheduler_config = {**family.scheduler_config, **changes} if changes else None
    return partial(family.to(device).generate, scheduler_config=scheduler_config)


def _from_pipeline(
    base: str, options: Mapping[str, str], adapt: _Adapt, dtype: torch.dtype, device: str
) -> Callable[..., list[Image.Image]]:
    """Function that draws with a base of no known family, through its diffusers pipeline, and the adapter."""
    adapt.changes(None)
    if others := sorted(options.keys() - {"revision", "variant"}):
        raise UserError(f"{others[0]} needs a known model family, and {base!r} is of none; name it with --family")
    try:
        pipeline = DiffusionPipeline.from_pretrained(resolve(base), dtype=dtype, **options)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot load the base {base!r}: {error}") from error
    if adapt.adapter is not None and adapt.adapter.new_tokens:
        raise UserError(
            f"the adapter {adapt.path} has new tokens, and {base!r} is of no known model family; name it with --family"
        )
    adapt(partial(_adapted_part, pipeline), pipeline.components)
    if changes := adapt.scheduler_changes:
        config = {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config, **changes}
        pipeline.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipeline.set_progress_bar_config(disable=True)
    return partial(generate, pipeline.to(device))


def _check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device={device!r} cannot be used here ({reason}); use cpu, or leave it out") from error


def _family_class(family: str | None, base: str | None, options: Mapping[str, str]) -> type[ModelFamily] | None:
    """The family of this name or import path, or the one for the base's pipeline; None if there is none."""
    if family is not None:
        return named_family(family)
    return family_of_source(ModelSource(base, **options)) if base else None


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
