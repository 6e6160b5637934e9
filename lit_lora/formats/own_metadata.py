"""What this project adds to the metadata of every adapter file, so that reading gives back what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, families
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.model_spec import OF_THE_FILE
from lit_lora.formats.tensor_file import TensorFile

_KEY = "lit_lora"
OWN_PREFIX = f"{_KEY}."
"""Start of the names of entries about what an adapter needs beside its base."""
_OF_OTHERS = ("format", "lora_adapter_metadata")
"""Entries that safetensors' users and diffusers write by themselves."""


def file_metadata(
    adapter: AdapterFiles, configs: bool = False, more: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The metadata for an adapter's file: the adapter's own, and one JSON entry that :func:`own_entry` reads.

    Args:
        adapter: Adapter to write.
        configs: Whether to include the PEFT configs, for formats that have no place of their own for them. Defaults to False.
        more: Further entries for :func:`own_entry`; defaults to none.
    """
    entry: dict[str, Any] = dict(more or {})
    if adapter.family is not None:
        entry["family"] = adapter.family.__name__
    if adapter.denoiser_config:
        entry["denoiser_config"] = dict(adapter.denoiser_config)
    if configs:
        entry["configs"] = {name: dict(part.config) for name, part in adapter.parts.items()}
    own = {_KEY: json.dumps(entry, sort_keys=True)} if entry else {}
    return {**adapter.metadata, **own}


def own_entry(file: TensorFile) -> dict[str, Any]:
    """The entry of :func:`file_metadata` in a file; empty for files of other tools.

    Raises:
        UserError: If the entry is damaged.
    """
    try:
        entry = json.loads(file.metadata.get(_KEY, "{}"))
    except ValueError as error:
        raise UserError(
            f"the metadata entry {_KEY!r} of {file.path} is no JSON ({error}); export the adapter again"
        ) from error
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(name, {}), dict) for name in ("denoiser_config", "configs")
    ):
        raise UserError(
            f"the metadata entry {_KEY!r} of {file.path} is not what this project writes; export the adapter again"
        )
    return entry


def foreign_metadata(file: TensorFile) -> dict[str, str]:
    """A file's metadata without the entries that are written anew with each file."""
    return {name: value for name, value in file.metadata.items() if name not in (_KEY, *_OF_OTHERS, *OF_THE_FILE)}


def differing_own(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Entries of this project beside the settings of a training, such as ``lit_lora.base_adapters``, that differ.

    An adapter computes something else where they are lost, unlike entries such as ``ss_steps``.
    """
    names = sorted(name for name in {**first, **second} if name.startswith(OWN_PREFIX))
    return [name for name in names if first.get(name) != second.get(name)]


def written_family(entry: Mapping[str, Any]) -> type[ModelFamily] | None:
    """The family that an :func:`own_entry` names, if a family of that name is imported; otherwise None."""
    return next((kind for kind in families() if kind.__name__ == entry.get("family")), None)
