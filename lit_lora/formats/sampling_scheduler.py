"""What an adapter's files say about the scheduler to sample with, where it differs from the base's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lit_lora.errors import UserError
from lit_lora.objectives import DDPM, FlowMatching

SCHEDULER_KEY = "lit_lora.scheduler"
"""Entry of an adapter's metadata with the changes of the base's scheduler."""


def scheduler_metadata(base: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, str]:
    """The entry of an adapter's metadata; nothing if the base's scheduler samples as it is.

    Args:
        base: Config of the base's scheduler.
        trained: Config of the scheduler that belongs to the training.
    """
    changes = {name: value for name, value in trained.items() if base.get(name) != value}
    return {SCHEDULER_KEY: json.dumps(changes, sort_keys=True)} if changes else {}


def scheduler_changes(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The entries of the base's scheduler config that an adapter needs changed; empty for most adapters.

    Raises:
        UserError: If the entry is damaged, or names a scheduler that no objective samples with.
    """
    try:
        changes: dict[str, Any] = dict(json.loads(metadata.get(SCHEDULER_KEY, "{}")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the metadata entry {SCHEDULER_KEY!r} is damaged ({error!r}); export the adapter again"
        ) from error
    name = changes.get("_class_name")
    if name is not None and name not in (*DDPM.schedulers, *FlowMatching.schedulers):
        raise UserError(f"the metadata entry {SCHEDULER_KEY!r} names the scheduler {name!r}, which is not supported")
    return changes
