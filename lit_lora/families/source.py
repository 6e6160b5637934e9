"""The source of a diffusion pipeline: a local folder or a hub repository."""

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
        path: Folder that diffusers' ``save_pretrained`` wrote, hub id, or ``embedded`` for the model in this package.
        revision: Branch, tag or commit on the hub; defaults to the hub's default branch.
        variant: Variant of the weight files, such as ``fp16``; defaults to the files without a variant.
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
        """Whether the pipeline has no such part, according to ``model_index.json`` or, without that file, its subfolders.

        A part that ``model_index.json`` lists but that is missing does not count as lacking: loading it raises an error.

        Args:
            part: Name of the part in the pipeline.
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
        """Read the config of a part.

        Args:
            part: Name of the part in the pipeline.
            kind: Class of the model, whose defaults complete configs of older files; defaults to the config as it is.

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
        """Load a part with ``from_pretrained(location, subfolder=part, **options)``.

        Args:
            part: Name of the part in the pipeline.
            from_pretrained: Function that loads the part.
            **options: Further arguments of the function.

        Raises:
            UserError: If the part is missing or cannot be read.
        """
        if self.is_local and not self._folder(part).is_dir():
            held = ", ".join(sorted(entry.name for entry in Path(self.location).iterdir())) or "nothing"
            raise UserError(
                f"{self.location} has no folder {part!r}, so the pipeline is incomplete; it holds {held}. Set "
                f"pretrained_model_name_or_path to a folder that diffusers' save_pretrained wrote, or to a hub id."
            )
        if self.revision:
            options["revision"] = self.revision
        try:
            return from_pretrained(self.location, subfolder=part, **options)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(f"cannot load {part!r} of {self.location!r}: {error}") from error

    def identity(self, parts: Mapping[str, list[str]]) -> dict[str, str]:
        """A text for each part that is equal if and only if its weights and settings are: see :func:`parts_identity`.

        Args:
            parts: Subfolders of each part. A part whose subfolders have no weights has no entry in the result.
        """
        if self.is_local:
            return parts_identity(Path(self.location), parts, self.variant)
        name = f"{self.location}@{self.revision or 'main'}"
        return dict.fromkeys(parts, f"{name}:{self.variant}" if self.variant else name)

    def _folder(self, part: str) -> Path:
        return Path(self.location) / part

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"
