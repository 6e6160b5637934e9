"""What an adapter's files say about the base beside its name, so that the same files are loaded again."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lit_lora.embedded import NAME
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, ModelSource
from lit_lora.families.source import is_file

_KEY = "lit_lora.base"
_NAME = "pretrained_model_name_or_path"


def options_metadata(family: ModelFamily) -> dict[str, str]:
    """The entry of an adapter's metadata; nothing if the name alone gives the same base.

    Args:
        family: Family of the base.
    """
    options = family.source.options(["vae", family.denoiser_name, *family.encoder_classes])
    entry = {_NAME: family.pretrained_model_name_or_path, **options}
    return {_KEY: json.dumps(entry, sort_keys=True)} if options else {}


def recorded_options(metadata: Mapping[str, str], base: str) -> dict[str, str]:
    """Arguments of a family's constructor beside the name of the base; none if the metadata are about another base.

    Args:
        metadata: Metadata of an adapter.
        base: Name of the base.

    Raises:
        UserError: If the entry is damaged.
    """
    try:
        entry = {str(name): str(value) for name, value in dict(json.loads(metadata.get(_KEY, "{}"))).items()}
    except (ValueError, TypeError) as error:
        raise UserError(f"the metadata entry {_KEY!r} is damaged ({error!r}); export the adapter again") from error
    return entry if entry.pop(_NAME, None) == base else {}


def loading_lines(metadata: Mapping[str, str], base: str, pipeline: str, vae_class: str) -> list[str]:
    """Lines of Python that load the base of an adapter in diffusers as ``pipeline``.

    Args:
        metadata: Metadata of the adapter.
        base: Name of the base.
        pipeline: Name of the pipeline's class.
        vae_class: Name of the class of its VAE.
    """
    options = recorded_options(metadata, base)
    vae = options.pop("vae", None)
    shipped = base == NAME
    place = "base_path()" if shipped else json.dumps(base)
    arguments = [place, *(f"{name}={json.dumps(value)}" for name, value in options.items())]
    lines = [f"from diffusers import {pipeline}"]
    if vae is not None:
        lines = [f"from diffusers import {', '.join(sorted([vae_class, pipeline]))}"]
        lines.append(f"\nvae = {vae_class}.{_function(vae)}({json.dumps(vae)}{_subfolder(base, vae)})")
        arguments.append("vae=vae")
    if shipped:
        lines.append("from lit_lora.embedded import base_path  # the small base that ships with lit_lora")
    lines.append(f"{'' if vae else chr(10)}pipeline = {pipeline}.{_function(base)}({', '.join(arguments)})")
    return lines


def _function(location: str) -> str:
    return "from_single_file" if is_file(location) else "from_pretrained"


def _subfolder(base: str, vae: str) -> str:
    """The argument for a VAE that is part of a pipeline."""
    try:
        return ', subfolder="vae"' if not is_file(vae) and ModelSource(base, vae=vae).place("vae")[1] else ""
    except UserError:  # it is not on this machine
        return ""
