"""The base of an adapter: a pipeline or one model, of which configs or weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from lit_lora.embedded import resolve
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, ModelSource, family_of
from lit_lora.families.hub import check_hub

INDEX = "model_index.json"
CONFIG = "config.json"

_STEMS = ("diffusion_pytorch_model", "model")
"""Starts of the names of weight files that diffusers and transformers write."""


class BaseModel:
    """A pipeline in diffusers' folder layout, or the folder of a single model.

    Args:
        path: Folder that ``save_pretrained`` of a pipeline or of a model wrote, hub id of a pipeline, or ``embedded``.
        weights: Whether weights will be read: a pipeline on the hub is downloaded then. Defaults to False; of a pipeline on the
            hub only configs are read.
        variant: Variant of the weight files, such as ``fp16``; defaults to the files without a variant, or else to the only
            variant that a part has.

    Raises:
        UserError: If there is no such pipeline or model.
    """

    def __init__(self, path: str, weights: bool = False, variant: str | None = None) -> None:
        self.path = path
        self.source = ModelSource(path, variant=variant)
        if not self.source.is_local:
            if Path(resolve(path)).exists():
                raise UserError(
                    f"{path} is a file; name the folder of a pipeline or a model that save_pretrained wrote"
                )
            check_hub(path, None)
            if weights:
                of_denoiser = self.source.variant_of("unet") or self.source.variant_of("transformer")
                options = {"variant": of_denoiser} if of_denoiser else {}
                self.source = ModelSource(str(DiffusionPipeline.download(path, **options)), variant=variant)
        self.index: Mapping[str, Any] = self.source.index()
        if not self.index and not (self.source.is_local and (self.folder / CONFIG).is_file()):
            raise UserError(
                f"{path} is neither a pipeline nor a model: it has no {INDEX} and no {CONFIG}; name a folder that diffusers' "
                f"save_pretrained wrote, or a hub id"
            )

    @property
    def folder(self) -> Path:
        """The local folder."""
        return Path(self.source.location)

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a pipeline, not a single model."""
        return bool(self.index)

    @property
    def family(self) -> type[ModelFamily] | None:
        """The model family of the pipeline; None if it is not known."""
        return family_of(str(self.index.get("_class_name")))

    def part(self, name: str) -> str:
        """The subfolder of an adapter's part, which is empty for a single model.

        Args:
            name: Name of the part in :attr:`lit_lora.formats.AdapterFiles.parts`.

        Raises:
            UserError: If the base has no such part.
        """
        if not self.is_pipeline:
            if name != "denoiser":
                raise UserError(f"{self.path} is a single model, and the adapter also changes {name}; name a pipeline")
            return ""
        found = [one for one in (("unet", "transformer") if name == "denoiser" else (name,)) if self.has(one)]
        if not found:
            parts = ", ".join(one for one in self.index if self.has(one)) or "nothing"
            raise UserError(f"{self.path} has no {name}, which the adapter changes; it has {parts}")
        return found[0]

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part.

        Args:
            part: Result of :meth:`part`.

        Raises:
            UserError: If it is missing or cannot be read.
        """
        if part:
            return self.source.config_of(part)
        try:
            config: dict[str, Any] = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.folder / CONFIG}: {error}; copy the model again") from error
        return config

    def shapes(self, part: str) -> nn.Module:
        """The model of a part on the meta device: layers and shapes without weights.

        Args:
            part: Result of :meth:`part`.

        Raises:
            UserError: If its class is not known, or its config is damaged.
        """
        config = self.config(part)
        library, name = self.index.get(part) or ("diffusers", str(config.get("_class_name")))
        kind: Any = getattr({"transformers": transformers}.get(str(library), diffusers), str(name), None)
        if kind is None:
            raise UserError(f"the class {name} of {self.path} is not known to {library}; upgrade {library}")
        try:
            with torch.device("meta"):
                if hasattr(kind, "config_class") and library == "transformers":
                    return kind(kind.config_class.from_dict(config)).eval()
                return kind.from_config(config).eval()
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"the config of {part or self.path} does not make a {name}: {error}") from error

    def weight_files(self, part: str) -> list[Path]:
        """The safetensors files of a part's weights.

        Args:
            part: Result of :meth:`part`.

        Raises:
            UserError: If there are none, or a file that an index lists is missing.
        """
        return find_weights(self.folder / part, self.source.variant_of(part))

    def has(self, name: str) -> bool:
        """Whether the pipeline has a part of this name."""
        entry = self.index.get(name)
        return isinstance(entry, list | tuple) and entry[0] is not None


def comparable(base: str) -> str:
    """The name of a base; the same folder has one name."""
    path = Path(base)
    return str(path.resolve()) if path.exists() else base.rstrip("/")


def find_weights(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model's weights in a folder.

    Args:
        folder: Folder that ``save_pretrained`` of a model wrote.
        variant: Variant of the weight files; defaults to none.

    Raises:
        UserError: If there are none, or a file that an index lists is missing.
    """
    infix = f".{variant}" if variant else ""
    for stem in _STEMS:
        if (whole := folder / f"{stem}{infix}.safetensors").is_file():
            return [whole]
        listed = folder / f"{stem}.safetensors.index{infix}.json"
        if listed.is_file():
            names = sorted(set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values()))
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise UserError(f"{listed} lists {missing[0]}, which is missing; copy or download the model again")
            return [folder / name for name in names]
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "nothing"
    raise UserError(
        f"{folder} has no weights as safetensors{f' of the variant {variant}' if variant else ''}; it holds {held}. Save the "
        f"model again with safe_serialization=True"
    )
