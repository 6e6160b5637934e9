"""The index of one shard."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lit_lora.datamodules.indexing.columns import SampleColumns
from lit_lora.datamodules.indexing.scan import EXTENSIONS, scan_shard
from lit_lora.errors import UserError
from lit_lora.files import atomic_file

_COLUMNS: dict[str, type[np.generic]] = {
    "key_bytes": np.uint8,
    "key_ends": np.int64,
    "width": np.int32,
    "height": np.int32,
    "member_sample": np.int64,
    "member_extension": np.uint8,
    "member_offset": np.int64,
    "member_size": np.int64,
}


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
        """The saved index of a shard, or a new one if that is missing, unreadable or out of date.

        A new index is saved if possible.

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
        columns = {name: np.ascontiguousarray(getattr(self, name)) for name in _COLUMNS}
        own, elsewhere = _sidecars(self.path)
        try:
            with atomic_file(own) as part:
                save_file(columns, part, _metadata(self.shard_size, self.shard_mtime_ns))
        except UserError:
            with atomic_file(elsewhere) as part:
                save_file(columns, part, _metadata(self.shard_size, self.shard_mtime_ns))

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
            The index; None if it cannot be read.
        """
        try:
            with safe_open(file, framework="numpy") as opened:
                metadata = opened.metadata() or {}
                columns: dict[str, Any] = {name: opened.get_tensor(name) for name in _COLUMNS}
            index = cls(
                path=path,
                shard_size=int(metadata["shard_size"]),
                shard_mtime_ns=int(metadata["shard_mtime_ns"]),
                **columns,
            )
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        right = metadata == _metadata(index.shard_size, index.shard_mtime_ns) and index._is_consistent()
        return index if right else None

    @classmethod
    def _load(cls, path: Path) -> ShardIndex | None:
        stat = _stat(path)
        for file in _sidecars(path):
            index = cls.read(file, path)
            if index is not None and (index.shard_size, index.shard_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return index
        return None

    def _is_consistent(self) -> bool:
        n, m = len(self.key_ends), len(self.member_sample)
        per_sample = (self.key_ends, self.width, self.height)
        per_member = (self.member_sample, self.member_extension, self.member_offset, self.member_size)
        return (
            n > 0
            and m > 0
            and all(getattr(self, name).dtype == dtype for name, dtype in _COLUMNS.items())
            and all(column.shape == (n,) for column in per_sample)
            and all(column.shape == (m,) for column in per_member)
            and self.key_bytes.shape == (int(self.key_ends[-1]),)
            and bool((np.diff(self.key_ends, prepend=0) > 0).all())
            and bool((np.diff(self.member_sample) >= 0).all())
            and 0 <= int(self.member_sample[0]) <= int(self.member_sample[-1]) < n
            and int(self.member_extension.max()) < len(EXTENSIONS)
            and int(self.member_offset.min()) >= 0
            and int(self.member_size.min()) >= 0
            and int((self.member_offset + self.member_size).max()) <= self.shard_size
        )


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
        return path.stat()
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}; check its name") from error
