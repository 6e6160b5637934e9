"""The rows of a shard in the index of its folder: its columns one after the other, so that one read fetches them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.indexing.bounds import DTYPES, STARTS
from lit_lora.datamodules.indexing.columns import SampleColumns

SIZES = ("width", "height")
"""Columns that the index also has for all shards, since the plan of buckets reads them alone."""

_PER_SAMPLE = ("key_ends", *SIZES)
_PER_MEMBER = ("member_sample", "member_offset", "member_size", "member_extension")
# Larger elements come first, so that all are aligned.
_ROWS = ("key_ends", *_PER_MEMBER[:3], *SIZES, "member_extension", "key_bytes")
_WORD_BYTES = 8


def word_starts(columns: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Number of the first int64 word of each shard's rows, and the total number of words, int64 (S + 1,)."""
    samples, members, key_bytes = (np.diff(columns[start]) for start in STARTS[:3])
    per_sample, per_member = (sum(_item_bytes(name) for name in names) for names in (_PER_SAMPLE, _PER_MEMBER))
    words = (per_sample * samples + per_member * members + key_bytes + _WORD_BYTES - 1) // _WORD_BYTES
    return np.concatenate([[0], np.cumsum(words)])


def join_rows(shard: SampleColumns) -> NDArray[np.int64]:
    """The rows of a shard, int64; zeros fill the last word."""
    data = b"".join(np.ascontiguousarray(getattr(shard, name)).tobytes() for name in _ROWS)
    return np.frombuffer(data + bytes(-len(data) % _WORD_BYTES), np.int64)


def split_rows(words: NDArray[np.int64], samples: int, members: int, key_bytes: int) -> dict[str, NDArray[Any]]:
    """The columns in the rows of a shard, as views."""
    lengths = dict.fromkeys(_PER_SAMPLE, samples) | dict.fromkeys(_PER_MEMBER, members) | {"key_bytes": key_bytes}
    data, end, columns = words.view(np.uint8), 0, {}
    for name in _ROWS:
        begin, end = end, end + lengths[name] * _item_bytes(name)
        columns[name] = data[begin:end].view(DTYPES[name])
    return columns


def checksums(shard: SampleColumns, words: NDArray[np.int64]) -> Mapping[str, int]:
    """Checksums of a shard's keys, rows and image sizes, under the names of the index's columns."""
    return {
        "keys_crc32": checksum(shard.key_ends, shard.key_bytes),
        "rows_crc32": checksum(words),
        "sizes_crc32": checksum(shard.width, shard.height),
    }


def checksum(*arrays: NDArray[Any]) -> int:
    """CRC-32 of the bytes of arrays, one after the other."""
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).data, found)
    return found


def _item_bytes(name: str) -> int:
    return np.dtype(DTYPES[name]).itemsize
