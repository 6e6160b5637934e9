"""Where the parts of a diffusion pipeline are: a folder or a hub repository."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, DiffusionPipeline

from lit_lora.embedded import resolve
from lit_lora.errors import UserError
from lit_lora.families.identity import parts_identity


class _ModelConfig(ConfigMixin):
    config_name = "config.json"


class _SchedulerConfig(ConfigMixin):
    config_name = "scheduler_config.json"


@dataclass(frozen=True)
class ModelSource:
    """A pipeline in diffusers' folder layout, on disk or on the hub.

    Args:
        path: A folder that diffusers' ``save_pretrained`` wrote, a hub id, or ``embedded`` for the model in this package.
        revision: Branch, tag or commit on the hub; the main branch by default.
        variant: Variant of the weight files, such as ``fp16``; the plain files by default.
    """

    path: str
    revision: str | None = None
    variant: str | None = None

    @property
    def location(self) -> str:
        """The folder or hub id to load from."""
        return resolve(self.path)

    @property
    def is_local(self) -> bool:
        """Whether the parts are in a local folder."""
        return Path(self.location).is_dir()

    def lacks(self, part: str) -> bool:
        """Whether the pipeline has no such part, as ``model_index.json`` says; where that is missing, a local folder tells.

        A part that is listed and missing is not lacking: loading it is an error.
        """
        if index := self.index():
            return index.get(part, [None])[0] is None
        return self.is_local and not self._folder(part).is_dir()

    def index(self) -> Mapping[str, Any]:
        """The contents of ``model_index.json``; empty if there is none."""
        options = {"revision": self.revision} if self.revision else {}
        try:
            index: Mapping[str, Any] = DiffusionPipeline.load_config(self.location, **options)
        except (OSError, ValueError):
            return {}
        return index

    def config(self, part: str, kind: type[Any] | None = None) -> dict[str, Any]:
        """The config of a part.

        Args:
            part: The part's name in the pipeline.
            kind: The model's class, whose defaults fill in what older files leave out; by default nothing is filled in.

        Raises:
            UserError: If the part is missing or its config cannot be read.
        """
        reader = _SchedulerConfig if part == "scheduler" else _ModelConfig
        config = dict(self.load(part, reader.load_config))
        if kind is None:
            return config
        parameters = inspect.signature(kind.__init__).parameters.values()
        return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty} | config

    def load(self, part: str, from_pretrained: Callable[..., Any], **options: Any) -> Any:
        """What ``from_pretrained(location, subfolder=part, **options)`` gives.

        Raises:
            UserError: If the part is missing or cannot be read; the message names part and source.
        """
        if self.is_local and not self._folder(part).is_dir():
            held = ", ".join(sorted(entry.name for entry in Path(self.location).iterdir())) or "nothing"
            raise UserError(
                f"{self.location} has no folder {part!r}, so the pipeline is not complete; it holds {held}. Give a folder that "
                f"diffusers' save_pretrained wrote, or a hub id."
            )
        if self.revision:
            options["revision"] = self.revision
        try:
            return from_pretrained(self.location, subfolder=part, **options)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(f"cannot load {part!r} of {self.location!r}: {error}") from error

    def identity(self, parts: Mapping[str, list[str]]) -> dict[str, str]:
        """A text for each part that differs where its weights or settings differ; see :func:`parts_identity`.

        Args:
            parts: The sub-folders of each part. A part whose folders have no weights is left out of the result.
        """
        if self.is_local:
            return parts_identity(Path(self.location), parts, self.variant)
        name = f"{self.location}@{self.revision or 'main'}"
        return dict.fromkeys(parts, f"{name}:{self.variant}" if self.variant else name)

    def _folder(self, part: str) -> Path:
        return Path(self.location) / part

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"
