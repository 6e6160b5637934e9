"""The source of a diffusion pipeline: a local folder or a hub repository."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, DiffusionPipeline

from lit_lora.embedded import resolve
from lit_lora.errors import UserError
from lit_lora.families.hub import check_hub, repository_files
from lit_lora.families.identity import folders_identity
from lit_lora.families.single_file import ENDINGS, SingleFile, open_single_file
from lit_lora.families.variants import WEIGHT_FILE, found_variant


class _ModelConfig(ConfigMixin):
    config_name = "config.json"


class _SchedulerConfig(ConfigMixin):
    config_name = "scheduler_config.json"


@dataclass(frozen=True)
class ModelSource:
    """A pipeline in diffusers' folder layout, on disk or on the hub, or a model in one file.

    Args:
        path: Folder that diffusers' ``save_pretrained`` wrote, hub id, file, or ``embedded`` for the model in this package.
        revision: Branch, tag or commit on the hub; defaults to the hub's default branch.
        variant: Variant of the weight files, such as ``fp16``; defaults to the files without a variant, or else to the only
            variant that a part has.
        vae: VAE to use instead of the pipeline's: a folder or hub id, of the VAE or of a pipeline with it, or a file; defaults to
            the pipeline's own.
        config: For a model in one file, folder or hub id with the configs, the tokenizers and all parts that the file does not
            have; defaults to the repository on the hub that diffusers takes for its kind.
    """

    path: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    config: str | None = None

    @property
    def location(self) -> str:
        """The folder, hub id or file to load from."""
        return resolve(self.path)

    @property
    def is_local(self) -> bool:
        """Whether the parts are in a local folder."""
        return Path(self.location).is_dir()

    @property
    def file(self) -> SingleFile | None:
        """The file with the model; None for a folder or hub id.

        Raises:
            UserError: If the file cannot be read as a model.
        """
        return _file(self.location)

    def file_of(self, part: str) -> SingleFile | None:
        """The file that may hold a part's weights; None for parts in folders.

        Args:
            part: Name of the part in the pipeline.

        Raises:
            UserError: If the file cannot be read as a model.
        """
        return _file(self.vae) if part == "vae" and self.vae is not None else self.file

    @cached_property
    def settings(self) -> ModelSource:
        """The source of the configs, the tokenizers, and of the weights that are not in a file.

        Raises:
            UserError: If it has to be named, or ``config`` is given without a file.
        """
        file = self.file
        if file is None:
            if self.config is not None:
                raise UserError(
                    f"config={self.config!r} is for models in one file, and {self.path} is none; leave it out"
                )
            return self
        where = self.config or file.repository
        if where is None:
            raise UserError(
                f"{self.path} is of a kind that diffusers does not know, so its configs have to be named; set config to the "
                f"folder or hub id of a pipeline of its kind"
            )
        named = ModelSource(where, self.revision, self.variant)
        if self.config is None:
            try:
                check_hub(named.location, named.revision)
            except UserError as error:
                raise UserError(
                    f"{self.path} is a model in one file, whose configs and tokenizers come from {where}: {error}; or set config "
                    f"to a folder of a pipeline of its kind"
                ) from error
        return named

    def lacks(self, part: str) -> bool:
        """Whether the pipeline has no such part, according to ``model_index.json`` or, without that file, its subfolders.

        A part that ``model_index.json`` lists but that is missing does not count as lacking: loading it raises an error.

        Args:
            part: Name of the part in the pipeline.
        """
        if index := self.index():
            return index.get(part, [None])[0] is None
        return self.settings.is_local and not (Path(self.settings.location) / part).is_dir()

    def index(self) -> Mapping[str, Any]:
        """The contents of ``model_index.json``; empty if there is none.

        Raises:
            UserError: If the pipeline is on the hub, and neither the hub nor a local copy can be read.
        """
        source = self.settings
        if not source.is_local:
            check_hub(source.location, source.revision)
        options = {"revision": source.revision} if source.revision else {}
        try:
            index: Mapping[str, Any] = DiffusionPipeline.load_config(source.location, **options)
        except (OSError, ValueError):
            return {}
        return index

    def config_of(self, part: str, kind: type[Any] | None = None) -> dict[str, Any]:
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
        source, folder = self.place(part)
        if source.is_local and not (Path(source.location) / folder).is_dir():
            held = ", ".join(sorted(entry.name for entry in Path(source.location).iterdir())) or "nothing"
            raise UserError(
                f"{source.location} has no folder {folder!r}, so the pipeline is incomplete; it holds {held}. Set "
                f"pretrained_model_name_or_path to a folder that diffusers' save_pretrained wrote, or to a hub id."
            )
        if not source.is_local:
            check_hub(source.location, source.revision)
        if source.revision:
            options["revision"] = source.revision
        try:
            return from_pretrained(source.location, subfolder=folder, **options)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            file = None if isinstance(error, UserError) else self.file_of(part)
            beside = "" if file is None else f"; {file.path} has no weights of it"
            files = sorted(Path(source.location, folder).iterdir()) if source.is_local else []
            if denied := next((one for one in files if not os.access(one, os.R_OK)), None):
                beside = f"; {denied} may not be read: change its permissions"  # safetensors calls it missing
            raise UserError(f"cannot load {part!r} of {source.location!r}: {error}{beside}") from error

    def variant_of(self, part: str) -> str | None:
        """Variant of a part's weight files: the given one, or else the only one that the part has; None for files without one.

        Args:
            part: Name of the part in the pipeline.

        Raises:
            UserError: If no variant is given, and the part has files of several variants and none without.
        """
        source, folder = self.place(part)
        if source.variant is not None:
            return source.variant
        return found_variant(source._files(folder), f"{part!r} of {source.location!r}")

    def options(self, parts: Iterable[str]) -> dict[str, str]:
        """The constructor's arguments beside the path with which the same files are found later, without those that are None.

        A variant that all parts with weights have is among them: later there may be other files too.

        Args:
            parts: Names of the pipeline's parts.
        """
        variant = self.variant
        if variant is None and self.file is None:
            own = [part for part in parts if any(map(WEIGHT_FILE.fullmatch, self._files(part)))]
            found = {self.variant_of(part) for part in own if part != "vae" or self.vae is None}
            variant = found.pop() if len(found) == 1 else None
        options = {"revision": self.revision, "variant": variant, "vae": self.vae, "config": self.config}
        return {name: value for name, value in options.items() if value is not None}

    def identity(self, parts: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """A text for each part that is equal if and only if its weights and settings are.

        Of folders and files on this machine it is a digest, see :func:`~lit_lora.families.identity.folders_identity` and
        :meth:`~lit_lora.families.single_file.SingleFile.digest`; parts on the hub are named.

        Args:
            parts: Subfolders of each part. A part without weights has no entry in the result.
        """
        found = {}
        for part, names in parts.items():
            file = self.file_of(names[0])
            inside = file.digest(part) if file else ""
            source, _ = self.place(names[0])
            if source.is_local:
                folders = {one: self.place(one)[1] for one in names}
                local = {one: (Path(source.location) / of, self.variant_of(one)) for one, of in folders.items()}
                text = folders_identity(local, without_weights=bool(inside))
            else:
                text = f"{source.location}@{source.revision or 'main'}" + (
                    f":{source.variant}" if source.variant else ""
                )
            if text:
                found[part] = f"{text};{inside}" if inside else text
        return found

    def place(self, part: str) -> tuple[ModelSource, str]:
        """Source and subfolder of a part's config, and of its weights unless they are in a file."""
        if part != "vae" or self.vae is None or _file(self.vae) is not None:
            return self.settings, part
        source = ModelSource(self.vae)
        if source.is_local:
            folder = Path(source.location)
            found = [one for one in ("vae", "") if (folder / one / "config.json").is_file()]
            if not found:
                raise UserError(
                    f"vae={self.vae!r} has neither config.json nor vae/config.json; name the folder of a VAE or of a pipeline"
                )
            return source, found[0]
        return source, "" if "config.json" in repository_files(source.location, None) else "vae"

    def _files(self, folder: str) -> list[str]:
        """Names of the files in a subfolder; empty if they are not known."""
        if self.is_local:
            place = Path(self.location) / folder
            return [file.name for file in place.iterdir()] if place.is_dir() else []
        listed = [name.rpartition("/") for name in repository_files(self.location, self.revision)]
        return [name for of, _, name in listed if of == folder]

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


def is_file(location: str) -> bool:
    """Whether a model's location is, or should be, one file."""
    path = Path(location)
    return path.is_file() or (path.suffix in ENDINGS and not path.is_dir())


def _file(location: str) -> SingleFile | None:
    return open_single_file(Path(location)) if is_file(location) else None
