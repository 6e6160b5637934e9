"""The source of a diffusion pipeline: a local folder or a hub repository."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, DiffusionPipeline
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lit_lora.embedded import resolve
from lit_lora.errors import UserError
from lit_lora.families.identity import parts_identity
from lit_lora.families.variants import WEIGHT_FILE, found_variant

_SECONDS_FOR_THE_HUB = 10


@lru_cache
def check_hub(repository: str, revision: str | None) -> None:
    """Check that a repository can be loaded: from the local copy of an earlier download, or from the hub.

    The libraries that load the parts would try each file for a while and report the first that is missing.

    Args:
        repository: Id of the repository.
        revision: Branch, tag or commit; None for the default branch.

    Raises:
        UserError: If there is no local copy, and the hub cannot be reached or has no such repository.
    """
    advice = "name a local folder that diffusers' save_pretrained wrote, or correct pretrained_model_name_or_path"
    try:
        if isinstance(try_to_load_from_cache(repository, "model_index.json", revision=revision), str):
            return
        HfApi(endpoint=constants.ENDPOINT).model_info(repository, revision=revision, timeout=_SECONDS_FOR_THE_HUB)
    except HFValidationError as error:
        raise UserError(
            f"{repository!r} is neither a folder nor the id of a repository on the hub; {advice}"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        shown = repository if revision is None else f"{repository}@{revision}"
        raise UserError(f"the hub has no repository {shown}, or it needs a login (hf auth login); {advice}") from error
    except Exception as error:  # the HTTP library differs between versions of huggingface_hub
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise UserError(f"the hub refuses {repository!r}: {error}; {advice}") from error
        raise UserError(
            f"{repository!r} is not on this machine, and the hub {constants.ENDPOINT} cannot be reached ({error}); check the "
            f"network, or {advice}"
        ) from error


@lru_cache
def repository_files(repository: str, revision: str | None) -> tuple[str, ...]:
    """Names of a repository's files: those on the hub, or without a connection those of the local copy.

    Args:
        repository: Id of the repository.
        revision: Branch, tag or commit; None for the default branch.
    """
    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            repository, revision=revision, timeout=_SECONDS_FOR_THE_HUB
        )
        return tuple(file.rfilename for file in info.siblings or ())
    except Exception:  # the HTTP library differs between versions of huggingface_hub
        try:
            copy = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return ()
        return tuple(file.relative_to(copy).as_posix() for file in copy.rglob("*"))


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
        variant: Variant of the weight files, such as ``fp16``; defaults to the files without a variant, or else to the only
            variant that a part has.
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
        """The contents of ``model_index.json``; empty if there is none.

        Raises:
            UserError: If the pipeline is on the hub, and neither the hub nor a local copy can be read.
        """
        if not self.is_local:
            check_hub(self.location, self.revision)
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
        if not self.is_local:
            check_hub(self.location, self.revision)
        if self.revision:
            options["revision"] = self.revision
        try:
            return from_pretrained(self.location, subfolder=part, **options)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(f"cannot load {part!r} of {self.location!r}: {error}") from error

    def variant_of(self, part: str) -> str | None:
        """Variant of a part's weight files: the given one, or else the only one that the part has; None for files without one.

        Args:
            part: Name of the part in the pipeline.

        Raises:
            UserError: If no variant is given, and the part has files of several variants and none without.
        """
        if self.variant is not None:
            return self.variant
        return found_variant(self._files(part), f"{part!r} of {self.location!r}")

    def options(self, parts: Iterable[str]) -> dict[str, str]:
        """The constructor's arguments beside the path with which the same files are found later, without those that are None.

        A variant that all parts with weights have is among them: later there may be other files too.

        Args:
            parts: Names of the pipeline's parts.
        """
        variant = self.variant
        if variant is None:
            found = {self.variant_of(part) for part in parts if any(map(WEIGHT_FILE.fullmatch, self._files(part)))}
            variant = found.pop() if len(found) == 1 else None
        options = {"revision": self.revision, "variant": variant}
        return {name: value for name, value in options.items() if value is not None}

    def identity(self, parts: Mapping[str, list[str]]) -> dict[str, str]:
        """A text for each part that is equal if and only if its weights and settings are: see :func:`parts_identity`.

        Args:
            parts: Subfolders of each part. A part whose subfolders have no weights has no entry in the result.
        """
        if self.is_local:
            return parts_identity(Path(self.location), parts, self.variant_of)
        name = f"{self.location}@{self.revision or 'main'}"
        return dict.fromkeys(parts, f"{name}:{self.variant}" if self.variant else name)

    def _files(self, part: str) -> list[str]:
        """Names of a part's files; empty if they are not known."""
        if self.is_local:
            folder = self._folder(part)
            return [file.name for file in folder.iterdir()] if folder.is_dir() else []
        listed = [name.rpartition("/") for name in repository_files(self.location, self.revision)]
        return [name for folder, _, name in listed if folder == part]

    def _folder(self, part: str) -> Path:
        return Path(self.location) / part

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"
