"""What an adapter's files say about the contents of its base, whose name or path may come to mean another one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from lit_lora.described import differences
from lit_lora.errors import UserError
from lit_lora.formats.base import AdapterFiles

_KEY = "ss_lit_lora_base"


def base_metadata(identity: Mapping[str, str]) -> dict[str, str]:
    """The entry of an adapter's metadata; nothing if the base is not known.

    Args:
        identity: Identities of the base's parts: see :meth:`lit_lora.families.ModelFamily.base_identity`.
    """
    return {_KEY: json.dumps(dict(identity), sort_keys=True)} if identity else {}


def changed_base(files: AdapterFiles, base: str, identity: Callable[[], Mapping[str, str]]) -> list[str]:
    """The parts of a base that are others than when an adapter was trained over the base of this name, with both identities.

    Args:
        files: The adapter. Of one that names another base, or does not know the contents of its base, nothing is compared.
        base: Name or path of the base.
        identity: Function that reads the identities of its parts.

    Raises:
        UserError: If the entry is damaged.
    """
    try:
        saved = {str(name): str(text) for name, text in json.loads(files.metadata.get(_KEY, "{}")).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"the metadata entry {_KEY!r} is damaged ({error!r}); export the adapter again") from error
    if not saved or files.base != base:
        return []
    return [f"{part} ({before}, now {now})" for part, before, now in differences(saved, identity())]
