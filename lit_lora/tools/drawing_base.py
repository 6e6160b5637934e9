"""The base that images are drawn with: of a known model family, or any diffusers pipeline."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from lit_lora.embedded import resolve
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, ModelSource, check_single_file, check_size
from lit_lora.formats.base_adapter import BaseAdapter
from lit_lora.formats.base_adapters import BaseAdapters
from lit_lora.memory.block_offload import BlockOffload
from lit_lora.sampling import generate

Size = tuple[int | None, int | None]
"""Height and width of images in pixels; None for the model's own."""


Saving = Literal["batches", "models", "blocks"]
"""What the GPU's memory does not hold at once, so that one is there at a time: images, models, or blocks of the denoiser."""

SAVINGS: tuple[Saving, ...] = ("batches", "models", "blocks")
"""The savings, from the cheapest one on; each includes those before it."""


class DrawingBase(ABC):
    """A base to draw with."""

    scheduler_config: Mapping[str, Any]
    """Config of the base's scheduler with its class as ``_class_name``, once the base is loaded."""

    @abstractmethod
    def load(
        self, dtype: torch.dtype, merged: Sequence[BaseAdapter], sizes: Sequence[Size], scheduler: str | None
    ) -> None:
        """Load the weights, with adapters merged into them; what can be checked without them is checked before.

        Args:
            dtype: dtype of the weights.
            merged: Adapters to merge.
            sizes: Heights and widths of the images in pixels; None for the model's own.
            scheduler: Class of the scheduler to draw with; None for the base's own.

        Raises:
            UserError: If the base cannot be loaded, or cannot draw such images or with this scheduler.
        """

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Identities of the parts that decide what is drawn, which need not be loaded: see ``ModelFamily.base_identity``."""

    @abstractmethod
    def to(self, device: str) -> None:
        """Move all parts to a device."""

    @property
    @abstractmethod
    def savings(self) -> Sequence[Saving]:
        """The savings of :data:`SAVINGS` that can be made, once the base is loaded."""

    def offload_blocks(self) -> None:
        """Have the blocks of the denoiser, which has its adapter, wait in host memory while others compute."""
        raise NotImplementedError

    @abstractmethod
    def denoiser(self, config: Mapping[str, Any]) -> nn.Module:
        """The denoiser that an adapter with this PEFT config was made for."""

    @property
    @abstractmethod
    def encoders(self) -> Mapping[str, Any]:
        """Text encoders by name, among other parts."""

    @abstractmethod
    def add_new_tokens(self, tokens: Mapping[str, Mapping[str, Tensor]], path: str) -> None:
        """Add new tokens with their embeddings by text encoder; the path is that of their adapter, for errors."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], scheduler_config: Mapping[str, Any] | None, **options: Any
    ) -> list[Image.Image]:
        """Draw images with a scheduler; None is the base's own. See :func:`lit_lora.sampling.generate` for the options."""


class FamilyBase(DrawingBase):
    """A base of a known model family.

    Args:
        kind: The family.
        base: Folder, hub id or file.
        options: Further arguments of the family's constructor.
    """

    savings = SAVINGS

    def __init__(self, kind: type[ModelFamily], base: str, options: Mapping[str, str]) -> None:
        self.family = kind(base, **options)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.family.scheduler_config

    def load(
        self, dtype: torch.dtype, merged: Sequence[BaseAdapter], sizes: Sequence[Size], scheduler: str | None
    ) -> None:
        check_single_file(self.family)
        self.family.read_configs()
        for size in sizes:
            check_size(self.family, *(edge or self.family.default_size for edge in size))
        _check_scheduler(self.scheduler_config, scheduler)
        adapters = BaseAdapters(merged, type(self.family))
        self.family.load(dtype, changes=adapters.changes())
        adapters.warn_of_rounding(dtype, "draw with --dtype float32 if that matters")

    def identity(self) -> dict[str, str]:
        self.family.read_configs()
        return self.family.base_identity() | {"scheduler": json.dumps(self.scheduler_config, sort_keys=True)}

    def to(self, device: str) -> None:
        self.family.to(device)

    def offload_blocks(self) -> None:
        advice = "free host memory, or draw on another device with --device"
        BlockOffload(self.family.denoiser, self.family.block_classes, advice=advice)

    def denoiser(self, config: Mapping[str, Any]) -> nn.Module:
        model: nn.Module = self.family.denoiser
        return model

    @property
    def encoders(self) -> Mapping[str, Any]:
        return self.family.encoders

    def add_new_tokens(self, tokens: Mapping[str, Mapping[str, Tensor]], path: str) -> None:
        self.family.add_new_tokens(tokens)

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], scheduler_config: Mapping[str, Any] | None, **options: Any
    ) -> list[Image.Image]:
        self.family.computes_on = options.get("offload_from")
        return self.family.generate(prompts, seeds, scheduler_config, **options)


class PipelineBase(DrawingBase):
    """A base of no known family, drawn with by its diffusers pipeline.

    Args:
        base: Folder or hub id.
        options: Revision and variant; the variant defaults to that which all parts have.

    Raises:
        UserError: If there are other options.
    """

    def __init__(self, base: str, options: Mapping[str, str]) -> None:
        if others := sorted(options.keys() - {"revision", "variant"}):
            raise UserError(f"{others[0]} needs a known model family, and {base!r} is of none; name it with --family")
        self._base, self._options = base, options
        self.pipeline: Any = None

    def load(
        self, dtype: torch.dtype, merged: Sequence[BaseAdapter], sizes: Sequence[Size], scheduler: str | None
    ) -> None:
        if merged:
            raise UserError(
                f"several adapters need a known model family, and {self._base!r} is of none; name it with --family"
            )
        source, parts = self._source_and_parts()
        options = source.options(parts)
        try:
            self.pipeline = DiffusionPipeline.from_pretrained(resolve(self._base), dtype=dtype, **options)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"cannot load the base {self._base!r}: {error}") from error
        own = self.pipeline.scheduler
        self.scheduler_config = {"_class_name": type(own).__name__, **own.config}
        _check_scheduler(self.scheduler_config, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)

    def identity(self) -> dict[str, str]:
        source, parts = self._source_and_parts()
        return source.identity({name: [name] for name in parts})

    @property
    def savings(self) -> Sequence[Saving]:
        return SAVINGS[: 1 if self.pipeline.model_cpu_offload_seq is None else 2]

    def _source_and_parts(self) -> tuple[ModelSource, list[str]]:
        source = ModelSource(self._base, **self._options)
        return source, [name for name, kind in source.index().items() if isinstance(kind, list) and kind[0]]

    def to(self, device: str) -> None:
        self.pipeline.to(device)

    def denoiser(self, config: Mapping[str, Any]) -> nn.Module:
        wanted = (config.get("auto_mapping") or {}).get("base_model_class")
        components = self.pipeline.components
        if wanted is None:
            parts = [components[name] for name in ("transformer", "unet") if name in components]
        else:
            parts = [part for part in components.values() if type(part).__name__ == wanted]
        if not parts:
            raise UserError(
                f"the adapter was made for a {wanted}, which {type(self.pipeline).__name__} does not have; set --base to the "
                f"base that the adapter was trained on"
            )
        model: nn.Module = parts[0]
        return model

    @property
    def encoders(self) -> Mapping[str, Any]:
        components: Mapping[str, Any] = self.pipeline.components
        return components

    def add_new_tokens(self, tokens: Mapping[str, Mapping[str, Tensor]], path: str) -> None:
        raise UserError(
            f"the adapter {path} has new tokens, and {self._base!r} is of no known model family; name it with --family"
        )

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], scheduler_config: Mapping[str, Any] | None, **options: Any
    ) -> list[Image.Image]:
        config = scheduler_config or self.scheduler_config
        self.pipeline.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        return generate(self.pipeline, prompts, seeds, **options)


def _check_scheduler(own: Mapping[str, Any], scheduler: str | None) -> None:
    """Refuse a scheduler that cannot take the place of the base's."""
    name = str(own["_class_name"])
    choices = {name, *getattr(diffusers, name)._compatibles}
    if scheduler is not None and scheduler not in choices:
        raise UserError(
            f"scheduler={scheduler!r} cannot take the place of the base's {name}; choose from {', '.join(sorted(choices))}"
        )
