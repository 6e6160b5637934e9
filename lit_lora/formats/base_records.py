"""What an adapter's files say about the adapters that it was trained over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lit_lora.errors import UserError

Records = Sequence[Mapping[str, Any]]
"""Adapters that were merged into a base: for each its name, its path, the SHA-256 of its tensors, a digest of its settings, such
as alpha, and its weight."""

_KEY = "lit_lora.base_adapters"


def base_metadata(records: Records) -> dict[str, str]:
    """The entry of an adapter's metadata; nothing without any records."""
    return {_KEY: json.dumps([dict(one) for one in records], sort_keys=True)} if records else {}


def base_records(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The records in an adapter's metadata.

    Raises:
        UserError: If the entry is damaged.
    """
    try:
        return [
            {**one, **{name: str(one[name]) for name in ("name", "path", "sha256")}, "weight": float(one["weight"])}
            for one in json.loads(metadata.get(_KEY, "[]"))
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the metadata entry {_KEY!r} is damaged ({error!r}); export the adapter again") from error


def told(records: Records) -> str:
    """Names and weights of the adapters, for messages."""
    names = [
        f"{one['name']} (weight {one['weight']}, SHA-256 {str(one['sha256'])[:12]}"
        + (f", settings {one['settings']})" if "settings" in one else ")")
        for one in records
    ]
    return " and ".join(names) or "no other adapter"


def same_adapters(here: Records, there: Records) -> bool:
    """Whether the adapters, their settings and their weights are the same, wherever their files are."""
    settings = all("settings" in record for record in (*here, *there))  # older files do not tell them

    def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
        dropped = bool(record.get("drop_text_encoders"))
        return record["sha256"], record["weight"], dropped, str(record["settings"]) if settings else ""

    return sorted(map(key, here)) == sorted(map(key, there))
