"""Repacking of the samples of tar shards."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.packing.image_formats import IMAGE_FILES
from lit_lora.datamodules.packing.input import PackInput, packed_size, show_planning
from lit_lora.datamodules.packing.left_out import BadFile
from lit_lora.datamodules.packing.sample_names import SampleNames
from lit_lora.datamodules.packing.tar_contents import MEMBERS, TWICE, TarContents
from lit_lora.distributed.jobs import run_jobs
from lit_lora.errors import UserError
from lit_lora.visible import visible

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource

_NUMBERS = {extension: number for number, extension in enumerate(MEMBERS)}


@dataclass(frozen=True, eq=False, kw_only=True)
class TarFiles(PackInput):
    """Samples of WebDataset shards, for example from img2dataset.

    The members of a sample need not be adjacent.

    Attributes:
        folder: Folder to which names of shards are relative.
        shards: Paths of the shards.
        unfinished: Paths of the shards that img2dataset has not finished.
        names: Keys of the samples in their shards.
        shard: Number of each sample's shard, int32 (N,).
        member_end: End of each sample's members in the following three arrays, int64 (N,).
        member_extension: Number of each member's extension in ``tar_contents.MEMBERS``, uint8 (M,).
        member_offset: Offset of each member's data in the shard, in bytes, int64 (M,).
        member_size: Size of each member's data, in bytes, int64 (M,).
    """

    extensions = ("tar",)

    folder: Path
    shards: tuple[Path, ...]
    unfinished: tuple[Path, ...]
    names: SampleNames
    shard: NDArray[np.int32]
    member_end: NDArray[np.int64]
    member_extension: NDArray[np.uint8]
    member_offset: NDArray[np.int64]
    member_size: NDArray[np.int64]

    @classmethod
    def find(cls, source: PackSource) -> TarFiles | None:
        """The samples of a shard, or of all shards in a folder, unless a metadata file lists images."""
        paths = source.files.get("tar", ())
        return cls.scan(source.folder, paths, source.jobs) if paths and not source.metadata else None

    @classmethod
    def scan(cls, folder: Path, shards: Sequence[Path], jobs: int = 1) -> TarFiles:
        """Scan shards for their samples, in order.

        img2dataset writes ``NAME_stats.json`` beside each complete shard; if there are any such files, shards without one are
        skipped. A damaged shard is skipped entirely.

        Args:
            folder: Folder to which names of shards are relative; it contains all ``shards``.
            shards: Paths of the shards.
            jobs: Number of processes that scan. Defaults to 1.
        """
        # If no shard has statistics, none of them is from img2dataset.
        kept = tuple(shard for shard in shards if _stats(shard).exists()) or tuple(shards)
        incomplete = tuple(sorted(set(shards) - set(kept)))
        bad: list[BadFile] = []
        skipped = [BadFile(_relative(shard, folder), _unfinished(shard)) for shard in incomplete]
        digest, numbers, ends, sizes = hashlib.sha256(), array("i"), array("q"), array("q")
        extensions, offsets, lengths = array("B"), array("q"), array("q")

        def keys() -> Iterator[str]:
            scans = run_jobs(_try_to_read, ((shard,) for shard in kept), jobs)
            for number, (shard, contents) in enumerate(zip(kept, scans, strict=True)):
                name = _relative(shard, folder)
                if isinstance(contents, str):
                    bad.append(BadFile(name, contents))
                    continue
                bad.extend(file.inside(name) for file in contents.bad)
                skipped.extend(file.inside(name) for file in contents.skipped)
                stat = shard.stat()
                digest.update(f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
                for key, members in contents.samples.items():
                    for extension in sorted(members, key=_NUMBERS.__getitem__):
                        extensions.append(_NUMBERS[extension])
                        offsets.append(members[extension][0])
                        lengths.append(members[extension][1])
                    numbers.append(number)
                    ends.append(len(extensions))
                    sizes.append(packed_size(*(size for _, size in members.values())))
                    # What follows the last dot is no part of the key.
                    yield f"{key}." if "." in key.rpartition("/")[2] else key

        names = SampleNames.of(show_planning(keys()))  # fills the columns
        return cls(
            folder=folder,
            shards=kept,
            unfinished=incomplete,
            names=names,
            shard=np.array(numbers, np.int32),
            member_end=np.array(ends, np.int64),
            member_extension=np.array(extensions, np.uint8),
            member_offset=np.array(offsets, np.int64),
            member_size=np.array(lengths, np.int64),
            sizes=np.array(sizes, np.int64),
            fingerprint=digest.hexdigest(),
            bad=tuple(bad),
            skipped=tuple(skipped),
        )

    def read_files(self) -> tuple[Path, ...]:
        return (*self.shards, *self.unfinished)

    def name(self, sample: int) -> str:
        return f"{_relative(self.shards[self.shard[sample]], self.folder)}: {self.names[sample].removesuffix('.')}"

    def key(self, sample: int) -> str:
        return self.names.key(sample)

    def members(self, sample: int) -> dict[str, bytes]:
        data: dict[str, bytes] = {}
        try:
            descriptor = os.open(self.shards[self.shard[sample]], os.O_RDONLY)
            try:
                for member in range(*self._member_range(sample)):
                    extension = MEMBERS[self.member_extension[member]]
                    offset, size = int(self.member_offset[member]), int(self.member_size[member])
                    if offset == TWICE:
                        raise BadSampleError(f"has two .{extension} members")
                    data[extension] = os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BadSampleError(f"cannot be read ({error.strerror})") from error
        if not set(data) & set(IMAGE_FILES):
            raise BadSampleError("has no image")
        return data

    def select(self, samples: NDArray[np.int64]) -> TarFiles:
        ranges = [np.arange(*self._member_range(sample)) for sample in samples.tolist()]
        members = np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
        return replace(
            self,
            names=self.names.select(samples),
            shard=self.shard[samples],
            member_end=np.cumsum([len(found) for found in ranges], dtype=np.int64),
            member_extension=self.member_extension[members],
            member_offset=self.member_offset[members],
            member_size=self.member_size[members],
            sizes=self.sizes[samples],
            bad=(),
            skipped=(),
        )

    def _member_range(self, sample: int) -> tuple[int, int]:
        return int(self.member_end[sample - 1]) if sample else 0, int(self.member_end[sample])


def _try_to_read(shard: Path) -> TarContents | str:
    """The samples of a shard, or the reason why it cannot be read."""
    try:
        return TarContents.read(shard)
    except UserError as error:
        return str(error).removeprefix(f"{visible(shard)} ")
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _relative(shard: Path, folder: Path) -> str:
    return shard.relative_to(folder).as_posix()


def _unfinished(shard: Path) -> str:
    return f"{_stats(shard).name} is missing: img2dataset was interrupted"


def _stats(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")
