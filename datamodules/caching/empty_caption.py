"""The embeddings of the empty caption, which lie once beside the shards of a cache with text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lit_lora.datamodules.caching.cached_decoder import types_of
from lit_lora.datamodules.caching.latent_cache import EMPTY
from lit_lora.errors import UserError
from lit_lora.files import atomic_file
from lit_lora.visible import visible


def parse_empty(data: bytes, name: str) -> dict[str, Tensor]:
    """The embeddings by name.

    Args:
        data: Content of the file.
        name: Path or URL of the file, for messages.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{name} cannot be read ({error}); remove the cache and make it anew") from error


def keep_empty(folder: Path, empty: Mapping[str, Tensor]) -> None:
    """Write the embeddings, or compare them with those of an earlier run.

    Args:
        folder: Folder of the cache.
        empty: Embeddings of one empty caption by name.

    Raises:
        UserError: If those of the earlier run are damaged, or have other names, dtypes or shapes.
    """
    path = folder / EMPTY
    if not path.exists():
        with atomic_file(path) as part:
            part.write_bytes(save(dict(empty)))
        return
    ours, theirs = types_of(empty), types_of(parse_empty(path.read_bytes(), visible(path)))
    if ours != theirs:
        raise UserError(
            f"{visible(folder)} has text embeddings {theirs}, and this run encodes {ours}; set model.base_dtype as before, name"
            " another folder with --out, or remove this one"
        )
