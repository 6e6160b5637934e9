"""The classes of a family's pipelines, of which a base has one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from torch import nn

from lit_lora.families.source import ModelSource


class PipelineKind(nn.Module):
    """Names a family's pipelines in class attributes, and finds out which of them a base has.

    A family may serve several pipelines of one denoiser, whose adapter files are the same.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """Diffusers pipeline for sampling and for the format of LoRA files."""
    other_pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = ()
    """Further pipelines of the family's models; none by default."""
    image_pipelines: ClassVar[tuple[str, ...]] = ()
    """Class names of pipelines of the family's denoiser for editing, filling and control, which get images as inputs besides the
    text; their models are refused. None by default."""
    takes_sources: ClassVar[bool] = False
    """Whether the family is trained on editing pairs: source image, instruction, target image. False by default."""
    encoder_classes: ClassVar[dict[str, type[Any]]]
    """Tokenizers and text encoders of :attr:`pipeline_class` by name."""
    optional_encoders: ClassVar[frozenset[str]] = frozenset()
    """Names in :attr:`encoder_classes` that a pipeline may lack; none by default."""

    source: ModelSource
    """Source of the base."""

    @classmethod
    def pipelines(cls) -> dict[str, type[DiffusionPipeline]]:
        """All pipelines of the family's models by the names of their classes."""
        return {kind.__name__: kind for kind in (cls.pipeline_class, *cls.other_pipelines)}

    @property
    def base_pipeline(self) -> type[DiffusionPipeline]:
        """The one of the family's pipelines that ``model_index.json`` names; defaults to :attr:`pipeline_class`."""
        return self.pipelines().get(self.source.index().get("_class_name", ""), self.pipeline_class)

    @property
    def base_encoders(self) -> dict[str, type[Any]]:
        """Tokenizers and text encoders of :attr:`base_pipeline` by name; defaults to :attr:`encoder_classes`."""
        return self.encoder_classes

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's constructor, beside those that ``model_index.json`` has; none by default."""
        return {}

    @property
    def base_options(self) -> Mapping[str, Any]:
        """Further arguments of the constructor of :attr:`base_pipeline`: those of ``model_index.json``, then the family's own."""
        known = inspect.signature(self.base_pipeline.__init__).parameters
        index = self.source.index().items()
        return {
            name: value for name, value in index if name in known and not isinstance(value, list | tuple)
        } | self.pipeline_options

    def skips(self, encoder: str) -> bool:
        """Whether a tokenizer or text encoder is not loaded; by default only an optional one that the pipeline lacks."""
        return encoder in self.optional_encoders and self.source.lacks(encoder)
