"""The index of all shards in a folder, in one memory-mapped file."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_lora.datamodules.indexing.bounds import (
    PATTERNS,
    PER_SHARD,
    STARTS,
    check_shard,
    check_table,
    sample_bits,
)
from lit_lora.datamodules.indexing.columns import SampleColumns
from lit_lora.datamodules.indexing.index import ShardIndex, index_folders, warn_of_damage
from lit_lora.datamodules.indexing.safetensors_map import map_tensors, release_pages, write_tensors
from lit_lora.datamodules.indexing.scan import EXTENSIONS
from lit_lora.datamodules.indexing.shard_rows import SIZES, checksum, checksums, join_rows, split_rows, word_starts
from lit_lora.datamodules.indexing.sparse_copy import SparseCopy
from lit_lora.distributed.jobs import run_jobs
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, check_regular, remove_unfinished

INDEX_NAME = "shards.index"
"""The file in a folder of shards."""

_HINT_AFTER_S = 3.0

_CHECKED_AT_ONCE = 1 << 22
"""Most members whose values are checked when an index is mapped: some tenths of a second, and 160 MB of mapped pages."""

_SHARDS_CHECKED_AT_ONCE = 1 << 11
"""Most shards of such an index, since each takes some tenths of a millisecond."""

_METADATA = {"format": "lit_lora.data_index", "version": "2", "extensions": " ".join(EXTENSIONS)}

_TABLE = (*STARTS, *PER_SHARD, *PATTERNS)
"""Columns with values for each shard, which come first in the file."""

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class DataIndex:
    """The samples (N) and members (M) of the shards (S) of one folder.

    It is saved in ``shards.index``, a safetensors file, in that folder or, if the folder is not writable, in the user's cache
    folder. 10 million samples take about 1 GB on disk, of which only the accessed parts are read into memory. First come the
    columns with values for each shard, checksums among them, then the rows of one shard after the other (see
    :mod:`~lit_lora.datamodules.indexing.shard_rows`), then the widths and heights of all images once more. The rows of a large
    index are checked shard by shard, when a shard is first used.

    Attributes:
        names: File names of the shards.
        shard_size: Sizes of the shards in bytes, int64 (S,).
        shard_mtime_ns: Modification times of the shards in nanoseconds, int64 (S,).
        sample_start: Number of the first sample of each shard, and the total number of samples, int64 (S + 1,).
        file: File that the index is mapped from; None if it is in memory alone.
        unchecked: Shards whose values are checked at their first use, bool (S,).
    """

    def __init__(
        self,
        names: Sequence[str],
        columns: Mapping[str, NDArray[Any]],
        file: Path | None = None,
        copy: SparseCopy | None = None,
    ) -> None:
        self.names = tuple(names)
        self.shard_size: NDArray[np.int64] = columns["shard_size"]
        self.shard_mtime_ns: NDArray[np.int64] = columns["shard_mtime_ns"]
        self.sample_start: NDArray[np.int64] = columns["sample_start"]
        self._columns = columns
        self._word_start = word_starts(columns)
        self.file = file
        self._copy = copy
        self.unchecked: NDArray[np.bool_] = np.zeros(len(self.names), bool)

    def __len__(self) -> int:
        return int(self.sample_start[-1])

    @classmethod
    def load_or_build(cls, paths: Sequence[Path], jobs: int = 1) -> DataIndex:
        """The index of the shards of one folder: the saved index if it is up to date, otherwise a new one, which is saved.

        A damaged index causes a warning and is made again. Shards without an up-to-date index of their own are scanned. Entries
        of other shards in the folder are kept.

        Args:
            paths: Shards in one folder; the index may contain further ones.
            jobs: Number of processes that scan. Defaults to 1. With more than one, a script that calls this needs
                ``if __name__ == "__main__":``.

        Raises:
            UserError: If shards are missing or damaged; the message names all of them. The indexes of the other shards are saved.
        """
        folder = paths[0].parent
        found = cls._find(folder)
        current = next((index for index in found if index._is_current(paths)), None)
        if current is not None:
            return current
        wanted = {path.name: path for path in paths}
        known = {name: folder / name for index in found[:1] for name in index.names if (folder / name).is_file()}
        every = known | wanted
        made = cls.combine(_index_all([every[name] for name in sorted(every)], jobs, wanted.keys()))
        for place in index_folders(folder):  # not before, when the processes of a killed run may not have ended yet
            remove_unfinished(place, "*.index")
        for place in index_folders(folder):
            with suppress(UserError, OSError):
                made.save(place / INDEX_NAME)
                return cls.load(place / INDEX_NAME)
        return made

    @classmethod
    def load(cls, file: str | Path, location: str | None = None) -> DataIndex:
        """Map an index file, and check its values against their bounds.

        Args:
            file: Path of the file.
            location: URL of the index that the file is a sparse copy of, see
                :class:`~lit_lora.datamodules.indexing.sparse_copy.SparseCopy`. Defaults to None: the file is complete.

        Raises:
            UserError: If the file is missing, damaged, or of another version.
        """
        file = Path(file)
        try:
            return cls._map(file, location)
        except _UNREADABLE as error:
            raise _unreadable(file, error) from error

    @classmethod
    def _map(cls, file: Path, location: str | None = None, check: bool = True) -> DataIndex:
        """The same; raises one of ``_UNREADABLE`` with the reason. ``check`` is whether to check the values."""
        check_regular(file)
        may_write = location is not None and os.access(file, os.W_OK)
        with file.open("r+b" if may_write else "rb") as opened:
            columns, offsets, metadata = map_tensors(opened)
            copy = None if location is None else SparseCopy(location, file, opened, columns, offsets)
        named, stated = metadata.pop("names"), metadata.pop("crc32", None)
        if metadata != _METADATA:
            raise ValueError("it has another format or version")
        if stated != _table_checksum(named, columns):
            raise ValueError("its checksum is not that of its columns")
        names = json.loads(named)
        check_table(columns, names)
        index = cls(names, columns, file, copy)
        lengths = {"rows": int(index._word_start[-1]), **dict.fromkeys(SIZES, len(index))}
        for name, length in lengths.items():
            if columns[name].dtype != (np.int64 if name == "rows" else np.int32) or len(columns[name]) != length:
                raise ValueError(f"its columns do not match: {name} does not have {length} values")
        many = int(columns["member_start"][-1]) > _CHECKED_AT_ONCE or len(names) > _SHARDS_CHECKED_AT_ONCE
        if many or copy is not None:
            index.unchecked[:] = True
        elif check:
            for number in range(len(names)):
                index._check_rows(number)
            index.release()
        return index

    @classmethod
    def combine(cls, indexes: Sequence[ShardIndex]) -> DataIndex:
        """The combined index of one or more shards of one folder."""
        rows = [join_rows(index) for index in indexes]
        sums = [checksums(index, words) for index, words in zip(indexes, rows, strict=True)]
        patterns = [np.unique(sample_bits(vars(index)), return_counts=True) for index in indexes]
        lengths = (
            [len(index) for index in indexes],
            [len(index.member_sample) for index in indexes],
            [len(index.key_bytes) for index in indexes],
            [len(found) for found, _ in patterns],
        )
        columns: dict[str, NDArray[Any]] = {
            start: np.cumsum([0, *counts], dtype=np.int64) for start, counts in zip(STARTS, lengths, strict=True)
        }
        columns["shard_size"] = np.array([index.shard_size for index in indexes], np.int64)
        columns["shard_mtime_ns"] = np.array([index.shard_mtime_ns for index in indexes], np.int64)
        columns |= {name: np.array([of_shard[name] for of_shard in sums], np.int64) for name in sums[0]}
        columns |= {name: np.concatenate([one[place] for one in patterns]) for place, name in enumerate(PATTERNS)}
        columns["rows"] = np.concatenate(rows)
        columns |= {name: np.concatenate([getattr(index, name) for index in indexes]) for name in SIZES}
        return cls([index.path.name for index in indexes], columns)

    def save(self, file: str | Path) -> None:
        """Write the index.

        Raises:
            UserError: If the folder is not writable.
        """
        names = json.dumps(self.names)
        metadata = _METADATA | {"names": names, "crc32": _table_checksum(names, self._columns)}
        with atomic_file(file) as part:
            write_tensors(part, {name: self._columns[name] for name in (*_TABLE, "rows", *SIZES)}, metadata)

    def shard(self, number: int, path: Path | None = None) -> ShardIndex:
        """The index of one shard, as a view.

        Raises:
            UserError: If the values of the shard had not been checked yet and are out of bounds, or cannot be copied.
        """
        if self.unchecked[number]:
            if self._copy is not None:
                self._copy.complete_rows(number)
            try:
                self._check_rows(number)
            except ValueError as error:
                raise _unreadable(self.file, error) from error
            self.unchecked[number] = False
        return ShardIndex(
            path=path or Path(self.names[number]),
            shard_size=int(self.shard_size[number]),
            shard_mtime_ns=int(self.shard_mtime_ns[number]),
            **self._rows(number),
        )

    def image_sizes(self, first: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Widths and heights of the images in the shards ``first`` to ``end`` - 1, int32 (n,).

        Raises:
            UserError: If they cannot be copied.
        """
        if self._copy is not None:
            self._copy.complete_sizes(first, end)
        samples = slice(*self.sample_start[[first, end]].tolist())
        return self._columns["width"][samples], self._columns["height"][samples]

    def lacking(self, bits: int) -> NDArray[np.int64]:
        """Number of samples in each shard that have none of the members ``scan.EXTENSIONS[i]`` with bit ``i``, int64 (S,)."""
        counts = np.where((self._columns["patterns"] & bits) == 0, self._columns["pattern_counts"], 0)
        lacking: NDArray[np.int64] = np.add.reduceat(counts, self._columns["pattern_start"][:-1])
        return lacking

    def keys_crc32(self, first: int, end: int) -> NDArray[np.int64]:
        """Checksums of the keys in the shards ``first`` to ``end`` - 1, int64."""
        sums: NDArray[np.int64] = self._columns["keys_crc32"][first:end]
        return sums

    def release(self) -> None:
        """Free the memory of the pages that were read, after a pass over the whole index."""
        release_pages(self._columns["rows"])

    def _words(self, number: int) -> NDArray[np.int64]:
        words: NDArray[np.int64] = self._columns["rows"][slice(*self._word_start[number : number + 2].tolist())]
        return words

    def _rows(self, number: int) -> dict[str, NDArray[Any]]:
        """The columns of one shard, as views."""
        samples, members, key_bytes = (
            int(np.diff(self._columns[start][number : number + 2])[0]) for start in STARTS[:3]
        )
        return split_rows(self._words(number), samples, members, key_bytes)

    def _check_rows(self, number: int) -> None:
        """Check the values of one shard.

        Raises:
            ValueError: If they are out of bounds, or their checksum is wrong.
        """
        columns, name = self._rows(number), self.names[number]
        check_shard(columns, name, int(self.shard_size[number]))
        wrong = [
            what
            for what, found in checksums(SampleColumns(**columns), self._words(number)).items()
            if found != self._columns[what][number]
        ]
        if wrong:
            raise ValueError(f"{wrong[0]} of {name} is not that of its values")
        samples = slice(*self.sample_start[number : number + 2].tolist())
        sizes = checksum(*(self._columns[column][samples] for column in SIZES))
        if self._copy is None and sizes != self._columns["sizes_crc32"][number]:
            raise ValueError(f"the image sizes of {name} for the plan of buckets are not those of its samples")
        kinds = slice(*self._columns["pattern_start"][number : number + 2].tolist())
        found = np.unique(sample_bits(columns), return_counts=True)
        for column, values in zip(PATTERNS, found, strict=True):
            if not np.array_equal(self._columns[column][kinds], values):
                raise ValueError(f"{column} of {name} are not those of its members")

    def __reduce__(self) -> tuple[Any, ...]:
        # Spawned workers map the file again instead of receiving a copy.
        if self.file is not None:
            location = None if self._copy is None else self._copy.location
            return _load_again, (self.file, location, self.names, self.shard_size.tolist())
        return DataIndex, (self.names, self._columns)

    @classmethod
    def _find(cls, folder: Path) -> list[DataIndex]:
        found = []
        for place in index_folders(folder):
            if os.path.lexists(place / INDEX_NAME):
                try:
                    found.append(cls._map(place / INDEX_NAME))
                except _UNREADABLE as error:
                    warn_of_damage(place / INDEX_NAME, error)
        return found

    def _is_current(self, paths: Sequence[Path]) -> bool:
        rows = {name: row for row, name in enumerate(self.names)}
        sizes, times = self.shard_size.tolist(), self.shard_mtime_ns.tolist()
        for path in paths:
            row = rows.get(path.name, -1)
            try:
                stat = os.stat(path)
            except OSError:
                return False  # the scan reports the reason
            if row < 0 or (stat.st_size, stat.st_mtime_ns) != (sizes[row], times[row]):
                return False
        return True


def _table_checksum(names: str, columns: Mapping[str, NDArray[Any]]) -> str:
    """Checksum of the names of the shards and of the columns with values for each of them."""
    named = np.frombuffer(names.encode("utf-8", "surrogatepass"), np.uint8)
    return str(checksum(named, *(columns[name] for name in _TABLE)))


def _unreadable(file: Path | None, error: Exception) -> UserError:
    return UserError(f"{file} is not a readable index ({error}); run `lit-lora shards index` on its folder again")


def _load_again(file: Path, location: str | None, names: tuple[str, ...], sizes: list[int]) -> DataIndex:
    """Map the file again in another process, and refuse it if it has changed; its values have been checked before."""
    try:
        index = DataIndex._map(file, location, check=False)
    except _UNREADABLE as error:
        raise UserError(f"{file} cannot be read any more ({error}); start again") from error
    if (index.names, index.shard_size.tolist()) != (names, sizes):
        raise UserError(f"{file} was changed by another program during the run; start again")
    return index


def _index_all(paths: list[Path], jobs: int, wanted: Collection[str]) -> list[ShardIndex]:
    """The indexes of shards; only failures of ``wanted`` shards are errors."""
    indexes: list[ShardIndex] = []
    problems: list[str] = []
    # The delayed progress bar appears only if shards have to be scanned.
    with tqdm(total=len(paths), desc="indexing shards", unit="shard", delay=_HINT_AFTER_S, leave=False) as bar:
        for path, outcome in zip(paths, run_jobs(_try_to_index, ((path,) for path in paths), jobs), strict=True):
            if not isinstance(outcome, str):
                indexes.append(outcome)
            elif path.name in wanted:
                problems.append(outcome)
            bar.update()
    refuse_unusable(problems, len(wanted))
    return indexes


def refuse_unusable(problems: Sequence[str], count: int) -> None:
    """Raise one error for all shards that cannot be used.

    Raises:
        UserError: If ``problems`` is not empty.
    """
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:20])
        raise UserError(f"{len(problems)} of {count} shards cannot be used:{shown}")


def _try_to_index(path: Path) -> ShardIndex | str:
    try:
        return ShardIndex.load_or_build(path)
    except UserError as error:
        return str(error)
