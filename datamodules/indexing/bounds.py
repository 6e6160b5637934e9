"""Bounds of the values in an index file, which may be damaged or come from somebody else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.indexing.scan import EXTENSIONS
from lit_lora.datamodules.indexing.tar_headers import BLOCK_BYTES

PER_SAMPLE = ("key_ends", "width", "height")
PER_MEMBER = ("member_sample", "member_extension", "member_offset", "member_size")
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

_OTHER_DTYPES: dict[str, Any] = {
    "sample_start": np.int64,
    "member_start": np.int64,
    "key_start": np.int64,
    "shard_size": np.int64,
    "shard_mtime_ns": np.int64,
    "extensions": np.uint16,
}

_MAX_BYTES = 2**62
"""Offsets and sizes below this cannot overflow when they are added."""

_BLOCK_MEMBERS = 1 << 15
"""Members that are checked at a time, so that the arrays fit into the processor's cache."""

_BITS = np.left_shift(1, np.arange(len(EXTENSIONS)))
_NUM_BITS = np.array([number.bit_count() for number in range(1 << len(EXTENSIONS))] + [0])
"""Number of bits of each sum of different ``_BITS``, and 0 for larger sums."""

Columns = Mapping[str, NDArray[Any]]


def check_lengths(columns: Columns, names: Sequence[str]) -> None:
    """Check the types and lengths of the columns of an index, and the names of its shards.

    Args:
        columns: Columns of a :class:`~lit_lora.datamodules.indexing.data_index.DataIndex`, by name.
        names: File names of its shards.

    Raises:
        ValueError: If a column is missing or has another type or length, or a name is not that of a file in a folder.
    """
    if not isinstance(names, list | tuple) or not names:
        raise ValueError("it names no shards")
    for name in names:
        if not isinstance(name, str) or not name or "/" in name or "\0" in name or name in (".", ".."):
            raise ValueError(f"{str(name)[:100]!r} is not the name of a shard in its folder")
    if len(set(names)) < len(names):
        raise ValueError("it names a shard twice")
    for name, dtype in (DTYPES | _OTHER_DTYPES).items():
        if columns[name].dtype != dtype or columns[name].ndim != 1:
            raise ValueError(f"its column {name} has another type, {columns[name].dtype}")
    for start, held in (("sample_start", PER_SAMPLE), ("member_start", PER_MEMBER), ("key_start", ("key_bytes",))):
        starts = columns[start]
        right = len(starts) == len(names) + 1 and starts[0] == 0 and bool((np.diff(starts) > 0).all())
        if not right or any(len(columns[name]) != starts[-1] for name in held):
            raise ValueError(f"its columns do not match: {start} does not fit {', '.join(held)}")
    per_shard = [len(columns[name]) for name in ("shard_size", "shard_mtime_ns")]
    if per_shard != [len(names)] * 2 or len(columns["extensions"]) != len(columns["width"]):
        raise ValueError("its columns do not match")


def check_values(columns: Columns, names: Sequence[str], first: int = 0, end: int | None = None) -> None:
    """Check each value of an index, or of some of its shards, against its bounds.

    Args:
        columns: Columns that :func:`check_lengths` has accepted; ``extensions`` may be missing.
        names: File names of the shards.
        first: First shard to check. Defaults to 0.
        end: Shard before which the check ends. Defaults to None: the number of shards.

    Raises:
        ValueError: If a value is out of bounds; the message names shard, entry, value and bound.
    """
    member_start = columns["member_start"]
    shard, end = first, len(names) if end is None else end
    while shard < end:
        last = int(np.searchsorted(member_start, member_start[shard] + _BLOCK_MEMBERS, "right")) - 1
        last = max(shard + 1, min(last, end))
        _check_shards(columns, names, shard, last)
        shard = last


def _check_shards(columns: Columns, names: Sequence[str], first: int, last: int) -> None:
    """Check the values of the shards ``first`` to ``last`` - 1."""
    block = _Block(columns, names, first, last)
    block.check("shard_size", block.shard_size, 1, _MAX_BYTES, of_shards=True)
    _check_samples(block)
    _check_members(block)
    _check_extensions(block)


class _Block:
    """Some of the shards of an index: their rows of each column, and the number of the first row of each shard."""

    def __init__(self, columns: Columns, names: Sequence[str], first: int, last: int) -> None:
        self.names = names[first:last]
        self.shard_size = columns["shard_size"][first:last]
        self.samples, self.members, self.keys = (
            columns[start][first : last + 1] - columns[start][first]
            for start in ("sample_start", "member_start", "key_start")
        )
        rows = {name: ("sample_start", columns[name]) for name in (*PER_SAMPLE, "extensions") if name in columns}
        rows |= {name: ("member_start", columns[name]) for name in PER_MEMBER}
        self.columns = {
            name: column[int(columns[start][first]) : int(columns[start][last])]
            for name, (start, column) in rows.items()
        }

    def check(self, name: str, values: NDArray[Any], least: int, most: int, of_shards: bool = False) -> None:
        """Refuse values outside of [least, most]."""
        if len(values) and (int(values.min()) < least or int(values.max()) > most):
            bad = np.flatnonzero((values < least) | (values > most))[0]
            self.refuse(name, int(bad), f"is {values[bad]}, not in [{least}, {most}]", of_shards)

    def refuse(self, name: str, row: int, problem: str, of_shards: bool = False) -> None:
        """Raise the error for a row of a column.

        Raises:
            ValueError: Always.
        """
        if of_shards:
            raise ValueError(f"{name} of {self.names[row]} {problem}")
        starts = self.members if name in PER_MEMBER else self.samples
        shard = int(np.searchsorted(starts, row, "right")) - 1
        what = "member" if name in PER_MEMBER else "sample"
        raise ValueError(f"{name} of {what} {row - starts[shard]} in {self.names[shard]} {problem}")


def _check_samples(block: _Block) -> None:
    most = int(np.iinfo(np.int32).max)
    block.check("width", block.columns["width"], 0, most)
    block.check("height", block.columns["height"], 0, most)
    ends = block.columns["key_ends"]
    block.check("key_ends", ends, 1, _MAX_BYTES)
    lengths = np.diff(ends, prepend=0)
    lengths[block.samples[:-1]] = ends[block.samples[:-1]]
    if lengths.min() < 1:
        row = int(np.argmin(lengths))
        block.refuse("key_ends", row, f"is {ends[row]}, before the key begins")
    totals = np.diff(block.keys)
    wrong = np.flatnonzero(ends[block.samples[1:] - 1] != totals)
    if len(wrong):
        row = int(block.samples[1:][wrong[0]]) - 1
        block.refuse("key_ends", row, f"is {ends[row]}, but its shard has {totals[wrong[0]]} bytes of keys")


def _check_members(block: _Block) -> None:
    sample, offset, size = (block.columns[name] for name in ("member_sample", "member_offset", "member_size"))
    firsts, lasts = block.members[:-1], block.members[1:] - 1
    block.check("member_extension", block.columns["member_extension"], 0, len(EXTENSIONS) - 1)
    block.check("member_sample", sample, 0, _MAX_BYTES)
    block.check("member_size", size, 0, _MAX_BYTES)
    block.check("member_offset", offset, BLOCK_BYTES, _MAX_BYTES)
    steps = np.diff(sample, prepend=0)
    steps[firsts] = -sample[firsts]  # the first member belongs to sample 0
    wrong = (steps < 0) | (steps > 1)
    wrong[lasts] |= sample[lasts] != np.diff(block.samples) - 1
    if wrong.any():
        row = int(np.argmax(wrong))
        block.refuse("member_sample", row, f"is {sample[row]}; each sample has members, in the order of the samples")
    ends = offset + size
    # Members follow each other: a header precedes each, and both fill whole blocks.
    least = np.empty_like(ends)
    least[0] = BLOCK_BYTES
    least[1:] = (ends[:-1] + 2 * BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
    least[firsts] = BLOCK_BYTES
    wrong = (offset < least) | (offset % BLOCK_BYTES != 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        block.refuse("member_offset", row, f"is {offset[row]}, not a multiple of {BLOCK_BYTES} from {least[row]} on")
    beyond = np.flatnonzero(ends[lasts] > block.shard_size)
    if len(beyond):
        row, end = int(lasts[beyond[0]]), ends[lasts[beyond[0]]]
        block.refuse("member_size", row, f"ends at byte {end} of a shard of {block.shard_size[beyond[0]]} bytes")


def _check_extensions(block: _Block) -> None:
    """Check that no member occurs twice, and that the bits of each sample are those of its members."""
    sample = block.columns["member_sample"]
    is_first = np.diff(sample, prepend=-1) != 0
    is_first[block.members[:-1]] = True
    starts = np.flatnonzero(is_first)
    ends = np.append(starts[1:], len(sample))
    sums = np.cumsum(_BITS[block.columns["member_extension"]])  # faster than reduceat
    found = np.diff(sums[ends - 1], prepend=0)
    # The bits of different extensions add up to a number with as many bits as there are members.
    twice = _NUM_BITS[np.minimum(found, len(_NUM_BITS) - 1)] != ends - starts
    if twice.any():
        row = int(starts[np.argmax(twice)])
        block.refuse("member_extension", row, "is that of a sample with two members of one extension")
    bits = block.columns.get("extensions", found)
    if (bits != found).any():
        row = int(np.argmax(bits != found))
        block.refuse("extensions", row, f"is {bits[row]}, but its members have {found[row]}")
