"""The local copy of a large remote index, of which only the parts in use are copied."""

from __future__ import annotations

import fcntl
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.indexing.safetensors_map import header_length, parse_header
from lit_lora.datamodules.indexing.shard_rows import SIZES, checksum, word_starts
from lit_lora.datamodules.remote.transfer import read_range
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, remedy
from lit_lora.redact import redact

MAX_INDEX_BYTES = 64 << 30
"""Maximum size of a remote index, enough for 600 million samples."""

_FIRST_BYTES = 1 << 16
"""Bytes that are read to learn how long the header is."""

_MAX_TABLE_BYTES = 256 << 20
"""Maximum size of the columns with values for each shard, three times that of a million shards."""

_MOST_SIZES = 1 << 21
"""Samples whose image sizes are copied at a time, 16 MiB."""


class SparseCopy:
    """The local copy of a remote index; a part of the file is a hole until it is first used.

    A part is there if it has the checksum that the table of shards states for it. So no record of the parts is kept, several
    processes may complete the same copy, a part that was written by half is copied again, and parts of an index that was
    replaced on the server are refused.

    Args:
        location: URL of the index.
        file: Path of the copy, for messages.
        opened: The copy, open for reading, and for writing unless it is complete; it may be closed afterwards.
        columns: The mapped columns of the copy.
        offsets: Byte at which each column begins in the file.
    """

    def __init__(
        self,
        location: str,
        file: Path,
        opened: BinaryIO,
        columns: Mapping[str, NDArray[Any]],
        offsets: Mapping[str, int],
    ) -> None:
        self.location = location
        self._file = file
        # The mapped file itself is written, also if another process has put a newer copy in its place.
        self._descriptor = os.dup(opened.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._columns = columns
        self._offsets = offsets
        self._word_start = word_starts(columns)
        self._unknown: NDArray[np.bool_] = np.ones(len(columns["shard_size"]), bool)

    def complete_rows(self, shard: int) -> None:
        """Have the rows of a shard in the copy.

        Raises:
            RemoteError: If they cannot be read.
            UserError: If the index has changed, or the copy cannot be written.
        """
        first, end = self._word_start[shard : shard + 2].tolist()
        wanted = self._columns["rows_crc32"][shard]
        if checksum(self._columns["rows"][first:end]) == wanted:
            return
        data = self._read("rows", first, end)
        if zlib.crc32(data) != wanted:
            raise self._changed()
        self._write("rows", first, data)

    def complete_sizes(self, first: int, end: int) -> None:
        """Have the image sizes of the shards ``first`` to ``end`` - 1 in the copy.

        Raises:
            RemoteError: If they cannot be read.
            UserError: If the index has changed, or the copy cannot be written.
        """
        if not self._unknown[first:end].any():
            return
        with self._lock():
            missing = [shard for shard in range(first, end) if self._unknown[shard] and not self._has_sizes(shard)]
            for part in self._runs(missing):
                self._copy_sizes(part)
        self._unknown[first:end] = False

    def _has_sizes(self, shard: int) -> bool:
        samples = slice(*self._columns["sample_start"][shard : shard + 2].tolist())
        found = checksum(*(self._columns[name][samples] for name in SIZES))
        return bool(found == self._columns["sizes_crc32"][shard])

    def _runs(self, shards: list[int]) -> Iterator[range]:
        """Shards that follow each other, with ``_MOST_SIZES`` samples at most if there are several."""
        starts = self._columns["sample_start"]
        begin = 0
        for place, shard in enumerate(shards):
            after = shards[place + 1] if place + 1 < len(shards) else -1
            if after != shard + 1 or starts[after + 1] - starts[shards[begin]] > _MOST_SIZES:
                yield range(shards[begin], shard + 1)
                begin = place + 1

    def _copy_sizes(self, shards: range) -> None:
        starts = self._columns["sample_start"][shards.start : shards.stop + 1]
        first, end = int(starts[0]), int(starts[-1])
        width, height = (np.frombuffer(self._read(name, first, end), np.int32) for name in SIZES)
        places = (starts - first).tolist()
        for shard, low, high in zip(shards, places, places[1:], strict=False):
            if checksum(width[low:high], height[low:high]) != self._columns["sizes_crc32"][shard]:
                raise self._changed()
        for name, values in zip(SIZES, (width, height), strict=True):
            self._write(name, first, values.tobytes())

    def _read(self, column: str, first: int, end: int) -> bytes:
        """The values ``first`` to ``end`` - 1 of a column of the remote index."""
        item = self._columns[column].itemsize
        return read_range(self.location, self._offsets[column] + first * item, (end - first) * item)

    def _write(self, column: str, first: int, data: bytes) -> None:
        offset = self._offsets[column] + first * self._columns[column].itemsize
        try:
            while data:
                written = os.pwrite(self._descriptor, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise UserError(
                f"cannot write the copy of {redact(self.location)} to {self._file}: {error.strerror}; {remedy(error)}"
            ) from error

    def _changed(self) -> UserError:
        return UserError(
            f"{redact(self.location)} has changed since this run opened it, or it is damaged: a checksum is wrong; start again,"
            " or copy the right file there"
        )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep other processes of this machine from copying the same part; without locks they only copy more than needed."""
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def copy_table(location: str, size: int, copy: Path) -> None:
    """Make a sparse copy of an index with its header and its columns of shards, unless the copy that is there begins so.

    Args:
        location: URL of the index.
        size: Size of the index in bytes.
        copy: Path of the copy.

    Raises:
        RemoteError: If the index cannot be read.
        ValueError: If it is damaged.
        OSError: If the copy cannot be written.
    """
    data = read_range(location, 0, min(size, _FIRST_BYTES))
    header_end = 8 + header_length(data[:8])
    if header_end > size:
        raise ValueError(f"it is truncated: its header ends at byte {header_end} of {size}")
    data += read_range(location, len(data), max(header_end - len(data), 0))
    tensors = parse_header(data[8:header_end])
    check_stated_size(header_end + max(high for _, _, high in tensors.values()))
    begin = tensors["rows"][1] if "rows" in tensors else size
    is_first = all(high <= begin for name, (_, _, high) in tensors.items() if name not in ("rows", *SIZES))
    if not is_first or begin > min(_MAX_TABLE_BYTES, size - header_end):
        raise ValueError("its header does not describe a table of shards before their rows, or states too many shards")
    end = header_end + begin
    data = (data + read_range(location, len(data), max(end - len(data), 0)))[:end]
    if copy.exists() and copy.stat().st_size == size:
        with copy.open("rb") as opened:
            if opened.read(end) == data:
                return
    with atomic_file(copy) as part, part.open("wb") as opened:
        opened.write(data)
        opened.truncate(size)


def check_stated_size(size: int) -> None:
    """Refuse an index that is larger than any index should be.

    Raises:
        ValueError: If the size is above ``MAX_INDEX_BYTES``.
    """
    if size > MAX_INDEX_BYTES:
        raise ValueError(f"its header states {size} bytes, more than {MAX_INDEX_BYTES}")
