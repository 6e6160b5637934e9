"""What an adapter's files say about the base beside its name, so that the same files are loaded again."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily

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
