"""The shards that a cache was made from, which may be changed later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.redact import redact


def is_newer(source: str, cached: Path) -> bool:
    """Whether a shard was changed after its cached shard was complete; False for one that is not on a local disk.

    Args:
        source: Location of the shard.
        cached: Existing cached shard.
    """
    return not is_remote(source) and Path(source).stat().st_mtime_ns > cached.stat().st_mtime_ns


def warn_of_newer_sources(locations: Sequence[str]) -> None:
    """Warn of cached shards whose sources, in the folder above as ``lit-lora cache`` puts them, were changed later.

    Args:
        locations: Locations of cached shards.
    """
    newer = []
    for cached in (Path(location) for location in locations if not is_remote(location)):
        source = cached.parent.parent / cached.name
        if source.is_file() and is_newer(str(source), cached):
            newer.append(source)
    if newer:
        rank_zero_warn(
            f"{redact(str(newer[0]))} and {len(newer) - 1} other shards were changed after the cache was made from them, so that "
            f"training may read older captions and images; remove their cached shards and run lit-lora cache again, or touch "
            f"these if the samples are the same"
        )
