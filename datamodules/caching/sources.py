"""The shards that a cache was made from, which may be changed later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.redact import redact

_LOOKED_AT = 1000
"""Most shards whose times are compared when training starts: on a network's disk each takes a millisecond."""


def is_newer(source: str, cached: Path) -> bool:
    """Whether a shard was changed after its cached shard was complete; False for one that is not on a local disk.

    Args:
        source: Location of the shard.
        cached: Existing cached shard.
    """
    return not is_remote(source) and Path(source).stat().st_mtime_ns > cached.stat().st_mtime_ns


def warn_of_newer_sources(locations: Sequence[str]) -> None:
    """Warn of cached shards whose sources, in the folder above as ``lit-lora cache`` puts them, were changed later.

    Of many shards it looks at some, evenly spread.

    Args:
        locations: Locations of cached shards.
    """
    newer = []
    some = locations[:: math.ceil(len(locations) / _LOOKED_AT) or 1]
    for cached in (Path(location) for location in some if not is_remote(location)):
        source = cached.parent.parent / cached.name
        if source.is_file() and is_newer(str(source), cached):
            newer.append(source)
    if newer:
        rank_zero_warn(
            f"{len(newer)} of {len(some)} shards that were looked at, among them {redact(str(newer[0]))}, were changed after the "
            f"cache was made from them, so that training may read older captions and images; remove their cached shards and run "
            f"lit-lora cache again, or touch these if the samples are the same"
        )
