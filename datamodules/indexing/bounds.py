"""Bounds of the values in an index file, which may be damaged or come from somebody else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.indexing.scan import EXTENSIONS
from lit_lora.datamodules.indexing.tar_headers import BLOCK_BYTES

DTYPES: dict[str, Any] = {
    "key_bytes": np.uint8,
    "key_ends": np.int64,
    "width": np.int32,
    "height": np.int32,
    "member_sample": np.int64,
    "member_extension": np.uint8,
    "member_offset": np.int64,
    "member_size": np.int64,
}
"""Types of the columns that describe samples and members."""

STARTS = ("sample_start", "member_start", "key_start", "pattern_start")
"""Columns of an index of a folder with the number of each shard's first row, and the total number of rows."""

PER_SHARD = ("shard_size", "shard_mtime_ns", "keys_crc32", "rows_crc32", "sizes_crc32")
"""Columns of an index of a folder with one value for each shard."""

PATTERNS = ("patterns", "pattern_counts")
"""Columns of an index of a folder with the kinds of samples in each shard."""

_MAX_BYTES = 2**62
"""Offsets and sizes below this cannot overflow when they are added."""

_MAX_ROWS = 2**40
"""Numbers of rows up to this cannot overflow when they are multiplied by the sizes of columns."""

_BITS = np.left_shift(1, np.arange(len(EXTENSIONS)))
_NUM_BITS = np.array([number.bit_count() for number in range(1 << len(EXTENSIONS))] + [0])
"""Number of bits of each sum of different ``_BITS``, and 0 for larger sums."""

Columns = Mapping[str, NDArray[Any]]


def check_names(names: Sequence[str]) -> None:
    """Check the names of the shards in an index.

    Raises:
        ValueError: If there are none, or a name occurs twice or is not that of a file in a folder.
    """
    if not isinstance(names, list | tuple) or not names:
        raise ValueError("it names no shards")
    for name in names:
        if not isinstance(name, str) or not name or "/" in name or "\0" in name or name in (".", ".."):
            raise ValueError(f"{str(name)[:100]!r} is not the name of a shard in its folder")
    if len(set(names)) < len(names):
        raise ValueError("it names a shard twice")


def check_table(columns: Columns, names: Sequence[str]) -> None:
    """Check the names of the shards in the index of a folder, and the columns that have values for each of them.

    Args:
        columns: Columns of a :class:`~lit_lora.datamodules.indexing.data_index.DataIndex`, by name.
        names: File names of its shards.

    Raises:
        ValueError: If a column is missing, has another type or length, or a number of rows or size is out of bounds.
    """
    check_names(names)
    for name in (*STARTS, *PER_SHARD, *PATTERNS):
        _check_type(name, columns[name], np.int64)
    for start in STARTS:
        starts = columns[start]
        is_right = len(starts) == len(names) + 1 and starts[0] == 0 and bool((np.diff(starts) > 0).all())
        if not is_right or starts[-1] > _MAX_ROWS:
            raise ValueError(f"its columns do not match: {start} does not fit {len(names)} shards")
    if any(len(columns[name]) != len(names) for name in PER_SHARD):
        raise ValueError("its columns do not match")
    if any(len(columns[name]) != columns["pattern_start"][-1] for name in PATTERNS):
        raise ValueError("its columns do not match: pattern_start does not fit patterns, pattern_counts")
    sizes = columns["shard_size"]
    wrong = np.flatnonzero((sizes < 1) | (sizes > _MAX_BYTES))
    if len(wrong):
        raise ValueError(f"shard_size of {names[wrong[0]]} is {sizes[wrong[0]]}, not in [1, {_MAX_BYTES}]")


def check_shard(columns: Columns, name: str, shard_size: int) -> None:
    """Check each value of the index of one shard against its bounds.

    Args:
        columns: Columns of a :class:`~lit_lora.datamodules.indexing.columns.SampleColumns`, by name.
        name: File name of the shard.
        shard_size: Size of the shard in bytes.

    Raises:
        ValueError: If a column has another type or length, or a value is out of bounds; the message names shard, entry, value
            and bound.
    """
    for column, dtype in DTYPES.items():
        _check_type(column, columns[column], dtype)
    samples, members = len(columns["key_ends"]), len(columns["member_sample"])
    if not samples or {len(columns["width"]), len(columns["height"])} != {samples}:
        raise ValueError("its columns do not match: key_ends does not fit width, height")
    if not members or any(len(columns[column]) != members for column in DTYPES if column.startswith("member_")):
        raise ValueError("its columns do not match: those of members have different lengths")
    shard = _Shard(columns, name)
    _check_samples(shard)
    _check_members(shard, shard_size)
    _check_twice(shard)


def sample_bits(columns: Columns) -> NDArray[np.int64]:
    """Members of each sample: the sum of the bits ``1 << i`` of its members with ``scan.EXTENSIONS[i]``, int64 (N,)."""
    sums = np.cumsum(_BITS[columns["member_extension"]])  # faster than reduceat
    lasts = np.flatnonzero(np.diff(columns["member_sample"], append=-1) != 0)
    bits: NDArray[np.int64] = np.diff(sums[lasts], prepend=0)
    return bits


class _Shard:
    """The columns of one shard, and the errors of its values."""

    def __init__(self, columns: Columns, name: str) -> None:
        self.columns = columns
        self.name = name

    def check(self, column: str, least: int, most: int) -> None:
        """Refuse values outside of [least, most]."""
        values = self.columns[column]
        if int(values.min()) < least or int(values.max()) > most:
            row = int(np.flatnonzero((values < least) | (values > most))[0])
            self.refuse(column, row, f"is {values[row]}, not in [{least}, {most}]")

    def refuse(self, column: str, row: int, problem: str) -> NoReturn:
        """Raise the error for a row of a column.

        Raises:
            ValueError: Always.
        """
        what = "member" if column.startswith("member_") else "sample"
        raise ValueError(f"{column} of {what} {row} in {self.name} {problem}")


def _check_type(name: str, column: NDArray[Any], dtype: Any) -> None:
    if column.dtype != dtype or column.ndim != 1:
        raise ValueError(f"its column {name} has another type, {column.dtype}")


def _check_samples(shard: _Shard) -> None:
    most = int(np.iinfo(np.int32).max)
    shard.check("width", 0, most)
    shard.check("height", 0, most)
    shard.check("key_ends", 1, _MAX_BYTES)
    ends, total = shard.columns["key_ends"], len(shard.columns["key_bytes"])
    lengths = np.diff(ends, prepend=0)
    if lengths.min() < 1:
        row = int(np.argmin(lengths))
        shard.refuse("key_ends", row, f"is {ends[row]}, before the key begins")
    if ends[-1] != total:
        shard.refuse("key_ends", len(ends) - 1, f"is {ends[-1]}, but its shard has {total} bytes of keys")


def _check_members(shard: _Shard, shard_size: int) -> None:
    sample, offset, size = (shard.columns[name] for name in ("member_sample", "member_offset", "member_size"))
    shard.check("member_extension", 0, len(EXTENSIONS) - 1)
    shard.check("member_sample", 0, _MAX_BYTES)
    shard.check("member_size", 0, _MAX_BYTES)
    shard.check("member_offset", BLOCK_BYTES, _MAX_BYTES)
    steps = np.diff(sample, prepend=0)  # the first member belongs to sample 0
    wrong = (steps < 0) | (steps > 1)
    wrong[0] |= sample[0] != 0
    wrong[-1] |= sample[-1] != len(shard.columns["key_ends"]) - 1
    if wrong.any():
        row = int(np.argmax(wrong))
        shard.refuse("member_sample", row, f"is {sample[row]}; each sample has members, in the order of the samples")
    ends = offset + size
    # Members follow each other: a header precedes each, and both fill whole blocks.
    least = np.empty_like(ends)
    least[0] = BLOCK_BYTES
    least[1:] = (ends[:-1] + 2 * BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
    wrong = (offset < least) | (offset % BLOCK_BYTES != 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        shard.refuse("member_offset", row, f"is {offset[row]}, not a multiple of {BLOCK_BYTES} from {least[row]} on")
    if ends[-1] > shard_size:
        shard.refuse("member_size", len(ends) - 1, f"ends at byte {ends[-1]} of a shard of {shard_size} bytes")


def _check_twice(shard: _Shard) -> None:
    """Check that no sample has two members of one extension."""
    bits = sample_bits(shard.columns)
    counts = np.bincount(shard.columns["member_sample"], minlength=len(bits))
    # The bits of different extensions add up to a number with as many bits as there are members.
    twice = _NUM_BITS[np.minimum(bits, len(_NUM_BITS) - 1)] != counts
    if twice.any():
        row = int(np.searchsorted(shard.columns["member_sample"], np.argmax(twice)))
        shard.refuse("member_extension", row, "is that of a sample with two members of one extension")
