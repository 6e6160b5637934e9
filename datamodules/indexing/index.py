"""The index of one shard."""

from __future__ import annotations

import hashlib
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lit_lora.datamodules.indexing.bounds import DTYPES, check_names, check_shard
from lit_lora.datamodules.indexing.columns import SampleColumns
from lit_lora.datamodules.indexing.safetensors_map import write_tensors
from lit_lora.datamodules.indexing.scan import EXTENSIONS, scan_shard
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, check_regular

_UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError)
"""What reading a damaged index raises."""


@dataclass(frozen=True, eq=False)
class ShardIndex(SampleColumns):
    """The index of a tar shard: its samples (N) and their members (M), as columns.

    It is saved beside the shard in ``NAME.tar.index``, a safetensors file, or in the user's cache folder if the folder of the
    shard is not writable.

    Attributes:
        path: Path of the shard.
        shard_size: Size of the shard in bytes.
        shard_mtime_ns: Modification time of the shard in nanoseconds.
    """

    path: Path
    shard_size: int
    shard_mtime_ns: int

    @classmethod
    def load_or_build(cls, path: str | Path) -> ShardIndex:
        """The saved index of a shard, or a new one if that is missing, damaged or out of date.

        A new index is saved if possible. A damaged one causes a warning.

        Raises:
            UserError: If the shard cannot be read, is damaged, contains no samples or contains a key twice.
        """
        path = Path(path)
        index = cls._load(path)
        if index is None:
            index = cls.build(path)
            with suppress(UserError, OSError):
                index.save()
        return index

    @classmethod
    def build(cls, path: str | Path) -> ShardIndex:
        """Build the index by scanning the shard.

        Raises:
            UserError: As for :meth:`load_or_build`.
        """
        path = Path(path)
        stat = _stat(path)  # before the scan, so that the index is stale if the shard changes during it
        shard = scan_shard(path)
        keys = [key.encode("utf-8", "surrogateescape") for key in shard.keys]
        members = np.array(shard.members, np.int64)
        sizes = np.array(shard.sizes, np.int32)
        return cls(
            path=path,
            shard_size=stat.st_size,
            shard_mtime_ns=stat.st_mtime_ns,
            key_bytes=np.frombuffer(b"".join(keys), np.uint8),
            key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
            width=sizes[:, 0].copy(),
            height=sizes[:, 1].copy(),
            member_sample=members[:, 0].copy(),
            member_extension=members[:, 1].astype(np.uint8),
            member_offset=members[:, 2].copy(),
            member_size=members[:, 3].copy(),
        )

    def save(self) -> None:
        """Write the index beside the shard or, if that is not possible, to the user's cache folder.

        Raises:
            UserError: If neither folder is writable.
        """
        columns = {name: np.ascontiguousarray(getattr(self, name)) for name in DTYPES}
        own, elsewhere = _sidecars(self.path)
        try:
            with atomic_file(own) as part:
                write_tensors(part, columns, _metadata(self.shard_size, self.shard_mtime_ns))
        except UserError:
            with atomic_file(elsewhere) as part:
                write_tensors(part, columns, _metadata(self.shard_size, self.shard_mtime_ns))

    def moved_to(self, path: Path) -> ShardIndex:
        """The index of the same shard under another name."""
        return replace(self, path=path)

    @classmethod
    def read(cls, file: Path, path: Path) -> ShardIndex | None:
        """Read an index file without access to its shard.

        Args:
            file: Path of the index.
            path: Path of the shard, which need not exist.

        Returns:
            The index; None if it is missing or damaged.
        """
        try:
            return cls._read(file, path)
        except _UNREADABLE:
            return None

    @classmethod
    def _read(cls, file: Path, path: Path) -> ShardIndex:
        """The same; raises one of ``_UNREADABLE`` with the reason."""
        check_regular(file)
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            columns: dict[str, Any] = {name: opened.get_tensor(name) for name in DTYPES}
        size, mtime_ns = int(metadata["shard_size"]), int(metadata["shard_mtime_ns"])
        if metadata != _metadata(size, mtime_ns):
            raise ValueError("it has another format or version")
        if not 0 < size < 2**63 or abs(mtime_ns) >= 2**63:
            raise ValueError(f"shard_size is {size} and shard_mtime_ns {mtime_ns}, which do not fit into 64 bits")
        index = cls(path=path, shard_size=size, shard_mtime_ns=mtime_ns, **columns)
        index._check()
        return index

    @classmethod
    def _load(cls, path: Path) -> ShardIndex | None:
        stat = _stat(path)
        for file in _sidecars(path):
            if not os.path.lexists(file):
                continue
            try:
                index = cls._read(file, path)
            except _UNREADABLE as error:
                warn_of_damage(file, error)
                continue
            if (index.shard_size, index.shard_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return index
        return None

    def _check(self) -> None:
        """Check types, lengths and values.

        Raises:
            ValueError: If they are not those of an index.
        """
        check_names([self.path.name])
        check_shard({name: getattr(self, name) for name in DTYPES}, self.path.name, self.shard_size)


def warn_of_damage(file: Path, error: Exception) -> None:
    """Warn that an index file cannot be used and is made again from the shards."""
    warnings.warn(f"{file} is not a readable index ({error}); it is made again from the shards", stacklevel=3)


def index_folders(folder: Path) -> tuple[Path, Path]:
    """Folders for the indexes of a folder's shards: the folder itself and, if it is not writable, one in the user's cache."""
    digest = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
    return folder, index_cache() / digest


def index_cache() -> Path:
    """Folder in the user's cache for indexes that cannot be saved beside their shards."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_lora" / "indexes"


def _sidecars(path: Path) -> list[Path]:
    return [folder / f"{path.name}.index" for folder in index_folders(path.parent)]


def _metadata(size: int, mtime_ns: int) -> dict[str, str]:
    return {
        "format": "lit_lora.shard_index",
        "version": "1",
        "extensions": " ".join(EXTENSIONS),
        "shard_size": str(size),
        "shard_mtime_ns": str(mtime_ns),
    }


def _stat(path: Path) -> os.stat_result:
    try:
        return check_regular(path)
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}; check its name") from error
