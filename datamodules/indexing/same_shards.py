"""Shards that are named in two places, maybe by other paths."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache

from lightning.pytorch.utilities import rank_zero_only

from lit_lora.datamodules.indexing.open_table import folder_and_name
from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.errors import UserError
from lit_lora.redact import redact

_log = logging.getLogger(__name__)


def resolved(locations: Sequence[str]) -> list[str]:
    """The locations with real paths of their folders, so that relative paths and links to a folder name the same shards."""
    real = cache(os.path.realpath)  # of folders alone: for 100,000 shards on a network's disk it takes minutes

    def one(location: str) -> str:
        folder, name = folder_and_name(location)
        return location if is_remote(location) else os.path.join(real(folder), name)

    return list(map(one, locations))


def check_named_once(locations: Sequence[str]) -> None:
    """Refuse shards that are named twice, whose samples a pass would show twice.

    Raises:
        UserError: If there is one.
    """
    known: dict[str, str] = {}
    for location, path in zip(locations, resolved(locations), strict=True):
        if path in known:
            also = "" if known[path] == location else f", also as {redact(known[path])}"
            raise UserError(f"{redact(location)} is named more than once{also}; name each shard once")
        known[path] = location


@rank_zero_only
def tell_validated_training(training: Sequence[str], validation: Sequence[str]) -> None:
    """Warn of shards that are both trained and validated on.

    Args:
        training: Locations of the shards to train on.
        validation: Locations of the shards to validate on.
    """
    trained = set(resolved(training))
    both = [shard for shard, path in zip(validation, resolved(validation), strict=True) if path in trained]
    if both:
        _log.warning(
            "%d of %d shards to validate on are trained on too, first %s: their loss does not tell what is learned for other"
            " images; name other val_shards",
            len(both),
            len(validation),
            redact(both[0]),
        )
