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
    """The samples of a tar shard (N) and their members (M), as columns.

    It is kept beside the shard in ``NAME.tar.index``, a safetensors file, or under the user's cache folder where the
    shard's own is not writable.

    Attributes:
        path: The shard.
        shard_size: Its size in bytes.
        shard_mtime_ns: Its time of modification in nanoseconds.
    """

    path: Path
    shard_size: int
    shard_mtime_ns: int

    @classmethod
    def load_or_build(cls, path: str | Path) -> ShardIndex:
        """The index that was saved beside the shard, or a new one if that is absent, unreadable or out of date.

        A new one is saved; where that is impossible, it stays in memory.

        Raises:
            UserError: If the shard cannot be read, is damaged, holds no samples or holds a key twice.
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
        """Scan the shard.

        Raises:
            UserError: As for :meth:`load_or_build`.
        """
        path = Path(path)
        stat = _stat(path)  # before the scan, so that a shard which changes meanwhile leaves a stale index
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
        """Write the index beside the shard, or under the user's cache folder where that is not possible.

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
        """The index in a file, of a shard that need not be here; None if it cannot be read.

        Args:
            file: The index.
            path: The shard.
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
    """Where indexes of the shards in a folder are: there, or under the user's cache folder if that is not writable."""
    digest = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
    return folder, index_cache() / digest


def index_cache() -> Path:
    """Where indexes are kept that cannot lie beside their shards."""
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
