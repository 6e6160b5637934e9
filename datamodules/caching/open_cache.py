"""Detection and opening of a cache of latents and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_lora.datamodules.caching.empty_caption import parse_empty
from lit_lora.datamodules.caching.latent_cache import DESCRIPTION, EMPTY, CacheDescription
from lit_lora.datamodules.caching.sources import SourceRecord, looked_at, warn_of_changed_sources
from lit_lora.datamodules.indexing.open_table import fetch_small, folder_and_name, inside, remote_copy
from lit_lora.datamodules.indexing.scan import CACHED_EXTENSION
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.remote.transfer import RemoteError, is_remote
from lit_lora.errors import UserError
from lit_lora.files import check_regular
from lit_lora.redact import redact

_MOST_BYTES = {DESCRIPTION: 64 << 20, EMPTY: 1 << 30}
"""Maximum sizes of the files that describe a cache."""


@dataclass(frozen=True)
class OpenCache:
    """The description and shared embeddings of a cache.

    Attributes:
        folder: Folder of the cache, for messages.
        description: Description of the cache.
        empty: Embeddings of one empty caption by name; empty if text is not cached.
    """

    folder: str
    description: CacheDescription
    empty: dict[str, Tensor]


def open_cache(table: SampleTable) -> OpenCache | None:
    """Open the cache to which the shards of a table belong; warns if the shards that it was made from were changed later.

    Returns:
        The cache; None if the shards hold images.

    Raises:
        UserError: If the shards belong to different caches, also within a folder, or the description or embeddings of a cache
            cannot be read.
    """
    are_cached: dict[str, bool] = {}
    for location, first_sample in zip(table.locations, table.starts.tolist(), strict=False):
        folder = folder_and_name(location)[0]
        if folder not in are_cached:
            are_cached[folder] = CACHED_EXTENSION in table.spans(first_sample)
    if not any(are_cached.values()):
        return None
    if not all(are_cached.values()):
        cached, others = (next(f for f, is_cached in are_cached.items() if is_cached is kind) for kind in (True, False))
        raise UserError(f"{redact(cached)} is a cache and {redact(others)} holds images; name only shards of one kind")
    warn_of_changed_sources(table.locations)
    caches = [_open(folder) for folder in are_cached]
    _refuse_shards_of_others(
        table.locations, {one: cache.description for one, cache in zip(are_cached, caches, strict=True)}
    )
    for other in caches[1:]:
        if differences := caches[0].description.differences(other.description):
            raise UserError(
                f"{caches[0].folder} and {other.folder} are different caches:\n  "
                + "\n  ".join(differences)
                + "\ntrain on one of them"
            )
    return caches[0]


def _refuse_shards_of_others(locations: Sequence[str], caches: Mapping[str, CacheDescription]) -> None:
    """Refuse shards that were copied into the folder of another cache, whose latents another VAE may have made.

    Of many shards it looks at some; those on other storage have no record here.
    """
    checksums = {folder: description.checksum() for folder, description in caches.items()}
    for location in looked_at([location for location in locations if not is_remote(location)]):
        record, folder = SourceRecord.read(Path(location)), folder_and_name(location)[0]
        if record is not None and record.cache not in (None, checksums[folder]):
            raise UserError(
                f"{redact(location)} is a shard of another cache than {redact(folder)}/{DESCRIPTION} describes: other encoders, "
                f"sizes or captions made it; move it to a folder of its own cache, or remove it and run lit-lora cache again"
            )


def _open(folder: str) -> OpenCache:
    name = redact(folder)
    description = CacheDescription.parse(_read(folder, DESCRIPTION), f"{name}/{DESCRIPTION}")
    if "text" not in description.cached:
        return OpenCache(name, description, {})
    return OpenCache(name, description, parse_empty(_read(folder, EMPTY), f"{name}/{EMPTY}"))


def _read(folder: str, name: str) -> bytes:
    unfinished = "the shards there belong to an unfinished cache: run `lit-lora cache` again"
    path = Path(inside(folder, name))
    if is_remote(folder):
        path = remote_copy(folder, name)
        try:
            fetch_small(inside(folder, name), path, _MOST_BYTES[name])
        except RemoteError as error:
            raise UserError(f"{error}. {unfinished}, and copy all of its files") if error.missing else error from None
    try:
        size = check_regular(path).st_size
        if size > _MOST_BYTES[name]:
            raise UserError(f"{path} has {size} bytes, more than {_MOST_BYTES[name]}; make the cache anew")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {unfinished}") from error
