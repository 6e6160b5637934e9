"""The index of all shards in a folder, in one memory-mapped file."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_lora.datamodules.indexing.bounds import DTYPES, PER_MEMBER, PER_SAMPLE, check_lengths, check_values
from lit_lora.datamodules.indexing.columns import SampleColumns
from lit_lora.datamodules.indexing.index import ShardIndex, index_folders, warn_of_damage
from lit_lora.datamodules.indexing.safetensors_map import map_tensors, release_pages, write_tensors
from lit_lora.datamodules.indexing.scan import EXTENSIONS
from lit_lora.distributed.jobs import run_jobs
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, check_regular, remove_unfinished

INDEX_NAME = "shards.index"
"""The file in a folder of shards."""

_HINT_AFTER_S = 3.0

_CHECKED_AT_ONCE = 1 << 22
"""Most members whose values are checked when an index is mapped: some tenths of a second, and 160 MB of mapped pages."""

_STARTS = ("sample_start", "member_start", "key_start")
_METADATA = {"format": "lit_lora.data_index", "version": "1", "extensions": " ".join(EXTENSIONS)}

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class DataIndex:
    """The samples (N) and members (M) of the shards (S) of one folder.

    It is saved in ``shards.index``, a safetensors file, in that folder or, if the folder is not writable, in the user's cache
    folder. 10 million samples take about 1 GB on disk, of which only the accessed parts are read into memory. The values of an
    index with more than four million members are checked shard by shard, when a shard is first used.

    Attributes:
        names: File names of the shards.
        shard_size: Sizes of the shards in bytes, int64 (S,).
        shard_mtime_ns: Modification times of the shards in nanoseconds, int64 (S,).
        sample_start: Number of the first sample of each shard, and the total number of samples, int64 (S + 1,).
        width: Widths of the images, see :class:`SampleColumns`, int32 (N,).
        height: Heights of the images, int32 (N,).
        file: File that the index is mapped from; None if it is in memory alone.
        unchecked: Shards whose values are checked at their first use, bool (S,).
        extensions: Members of each sample: bit ``i`` is set if it has ``scan.EXTENSIONS[i]``, uint16 (N,).
    """

    def __init__(self, names: Sequence[str], columns: dict[str, NDArray[Any]], file: Path | None = None) -> None:
        self.names = tuple(names)
        self.shard_size: NDArray[np.int64] = columns["shard_size"]
        self.shard_mtime_ns: NDArray[np.int64] = columns["shard_mtime_ns"]
        self.sample_start: NDArray[np.int64] = columns["sample_start"]
        self.width: NDArray[np.int32] = columns["width"]
        self.height: NDArray[np.int32] = columns["height"]
        self.extensions: NDArray[np.uint16] = columns["extensions"]
        self._columns = columns
        self.file = file
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
    def load(cls, file: str | Path) -> DataIndex:
        """Map an index file, and check its values against their bounds.

        Raises:
            UserError: If the file is missing, damaged, or of another version.
        """
        file = Path(file)
        try:
            return cls._map(file)
        except _UNREADABLE as error:
            raise UserError(
                f"{file} is not a readable index ({error}); run `lit-lora shards index` on its folder again"
            ) from error

    @classmethod
    def _map(cls, file: Path, check: bool = True) -> DataIndex:
        """The same; raises one of ``_UNREADABLE`` with the reason. ``check`` is whether to check the values."""
        check_regular(file)
        columns, metadata = map_tensors(file)
        names = json.loads(metadata.pop("names"))
        if metadata != _METADATA:
            raise ValueError("it has another format or version")
        check_lengths(columns, names)
        index = cls(names, columns, file)
        if len(columns["member_sample"]) > _CHECKED_AT_ONCE:
            index.unchecked[:] = True
        elif check:
            check_values(columns, names)
            index.release()
        return index

    @classmethod
    def combine(cls, indexes: Sequence[ShardIndex]) -> DataIndex:
        """The combined index of one or more shards of one folder."""
        columns: dict[str, NDArray[Any]] = {
            name: np.concatenate([getattr(index, name) for index in indexes]) for name in DTYPES
        }
        columns["shard_size"] = np.array([index.shard_size for index in indexes], np.int64)
        columns["shard_mtime_ns"] = np.array([index.shard_mtime_ns for index in indexes], np.int64)
        for name, of in (("sample_start", "key_ends"), ("member_start", "member_sample"), ("key_start", "key_bytes")):
            columns[name] = np.cumsum([0, *(len(getattr(index, of)) for index in indexes)], dtype=np.int64)
        columns["extensions"] = np.concatenate([_extension_bits(index) for index in indexes])
        return cls([index.path.name for index in indexes], columns)

    def save(self, file: str | Path) -> None:
        """Write the index.

        Raises:
            UserError: If the folder is not writable.
        """
        with atomic_file(file) as part:
            write_tensors(part, self._columns, _METADATA | {"names": json.dumps(self.names)})

    def shard(self, number: int, path: Path | None = None) -> ShardIndex:
        """The index of one shard, as a view.

        Raises:
            UserError: If the values of the shard had not been checked yet and are out of bounds.
        """
        if self.unchecked[number]:
            self._check_shard(number)
        parts: dict[str, Any] = {}
        for start, names in zip(_STARTS, (PER_SAMPLE, PER_MEMBER, ("key_bytes",)), strict=True):
            low, high = self._columns[start][number : number + 2].tolist()
            parts |= {name: self._columns[name][low:high] for name in names}
        return ShardIndex(
            path=path or Path(self.names[number]),
            shard_size=int(self.shard_size[number]),
            shard_mtime_ns=int(self.shard_mtime_ns[number]),
            **parts,
        )

    def key_bytes(self, first: int, end: int) -> NDArray[np.uint8]:
        """The keys of the shards ``first`` to ``end`` - 1, one after the other, uint8."""
        starts = self._columns["key_start"]
        keys: NDArray[np.uint8] = self._columns["key_bytes"][int(starts[first]) : int(starts[end])]
        return keys

    def release(self) -> None:
        """Free the memory of the pages that were read, after a pass over the whole index."""
        release_pages(self._columns["key_bytes"])

    def _check_shard(self, number: int) -> None:
        try:
            check_values(self._columns, self.names, number, number + 1)
        except ValueError as error:
            raise UserError(
                f"{self.file} is not a readable index ({error}); run `lit-lora shards index` on its folder again"
            ) from error
        self.unchecked[number] = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Spawned workers map the file again instead of receiving a copy.
        if self.file is not None:
            return _load_again, (self.file, self.names, self.shard_size.tolist())
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


def _extension_bits(index: SampleColumns) -> NDArray[np.uint16]:
    bits = np.zeros(len(index), np.uint16)
    for number in range(len(EXTENSIONS)):
        bits[index.member_sample[index.member_extension == number]] |= np.uint16(1 << number)
    return bits


def _load_again(file: Path, names: tuple[str, ...], sizes: list[int]) -> DataIndex:
    """Map the file again in another process, and refuse it if it has changed; its values have been checked before."""
    try:
        index = DataIndex._map(file, check=False)
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
