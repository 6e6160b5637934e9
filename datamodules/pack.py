"""Pack a folder of images with captions into tar shards."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lit_lora.datamodules.decode import BadSampleError
from lit_lora.datamodules.index import ShardIndex
from lit_lora.datamodules.pack_sources import BadFile, PackSource, find_sources
from lit_lora.draws import seed_of
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, writable_folder

_PLAN = "plan.json"
_TAR_BLOCK = 512


@dataclass(frozen=True)
class PackSummary:
    """What packing made.

    Attributes:
        folder: Where the shards are.
        shards: Their number.
        resumed: How many of them were there already.
        samples: The number of samples in all shards.
        size: Bytes of all shards.
        bad: What was left out.
    """

    folder: Path
    shards: int
    resumed: int
    samples: int
    size: int
    bad: list[BadFile]


@dataclass(frozen=True)
class _Shard:
    """A shard to write, and for one that has been written what came of it."""

    path: Path
    sources: Sequence[PackSource]
    samples: int = 0
    size: int = 0
    bad: tuple[BadFile, ...] = ()
    resumed: bool = False


class _NothingToWriteError(Exception):
    """All samples of a shard are bad; raised so that no empty file is left."""


def pack_folder(
    folder: str | Path,
    out: str | Path,
    *,
    samples_per_shard: int = 10_000,
    max_shard_bytes: int = 1_000_000_000,
    jobs: int = 1,
    shuffle_seed: int | None = None,
    max_bad: int = 0,
    caption_key: str = "caption",
    prefix: str = "shard",
) -> PackSummary:
    """Pack images with captions into tar shards, whose bytes depend on the input and the options but not on ``jobs``.

    Beside the shards and their indexes, ``out`` gets ``plan.json`` (which files the shards were planned from),
    ``bad.jsonl`` (what was left out and why) and, last, ``manifest.json``. A run that was cut short goes on where it
    was when it is started again; finished shards are kept.

    Args:
        folder: Images with a ``.txt`` or ``.json`` of the same name, at any depth; or images with a ``metadata.jsonl``.
        out: The folder for the shards.
        samples_per_shard: The most samples in a shard.
        max_shard_bytes: The most bytes in a shard; only a single sample may exceed it.
        jobs: Processes that pack, each a shard at a time. With more than one, a script that calls this needs
            ``if __name__ == "__main__":``.
        shuffle_seed: Pack in the random order of this seed; otherwise sorted by name.
        max_bad: So many files may be left out, because they are damaged or have no caption.
        caption_key: The key of the caption in ``.json`` files.
        prefix: How the names of the shards begin.

    Raises:
        UserError: An argument is out of bounds, there is nothing to pack, more than ``max_bad`` files are bad, or
            ``out`` holds other shards.
    """
    _check_least(1, samples_per_shard=samples_per_shard, max_shard_bytes=max_shard_bytes, jobs=jobs)
    _check_least(0, max_bad=max_bad)
    if not prefix or set(prefix) & set("/*?[]{}"):
        raise UserError(f"prefix={prefix!r} cannot begin a file name; use letters, digits and -")
    out = Path(out)
    sources, bad = find_sources(Path(folder))
    _check_bad(bad, max_bad)
    if shuffle_seed is not None:
        order = np.random.default_rng(seed_of(shuffle_seed, "pack")).permutation(len(sources))
        sources = [sources[number] for number in order]
    shards = _plan_shards(out, sources, samples_per_shard, max_shard_bytes, prefix)
    _claim(out, shards, caption_key)
    done: list[_Shard] = []
    with tqdm(total=len(sources), desc="packing", unit="sample", disable=None) as bar:
        for shard in _finish_all(shards, jobs, caption_key):
            done.append(shard)
            bad += shard.bad
            _check_bad(bad, max_bad)
            bar.update(len(shard.sources))
    return _conclude(out, done, bad)


def _check_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UserError(f"{name}={value} is too small; it must be at least {least}")


def _plan_shards(out: Path, sources: list[PackSource], most: int, most_bytes: int, prefix: str) -> list[_Shard]:
    groups: list[list[PackSource]] = []
    size = 0
    for source in sources:
        # Each member has a header and is filled up to whole blocks.
        packed = source.size + 2 * _TAR_BLOCK * len(source.members)
        if not groups or len(groups[-1]) == most or size + packed > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += packed
    digits = max(6, len(str(len(groups))))
    return [_Shard(out / f"{prefix}-{number:0{digits}}.tar", group) for number, group in enumerate(groups)]


def _claim(out: Path, shards: list[_Shard], caption_key: str) -> None:
    """Make sure that what ``out`` holds is a part of the same plan, and write the plan down."""
    digest = hashlib.sha256(caption_key.encode())
    for shard in shards:
        digest.update(f"\n{shard.path.name}".encode())
        for source in shard.sources:
            digest.update(f"\n{source.file}\t{source.key}\t{source.stamp}".encode("utf-8", "surrogateescape"))
    plan = {"format": "lit_lora.pack_plan", "version": 1, "shards": len(shards), "fingerprint": digest.hexdigest()}
    writable_folder(out)
    try:
        found = json.loads((out / _PLAN).read_text()) if (out / _PLAN).exists() else None
    except ValueError as error:
        raise UserError(f"{out / _PLAN} is not a plan of this program; name another output folder") from error
    if found is not None and found != plan:
        raise UserError(f"{out} holds shards of other files or options; name another output folder or empty this one")
    if found is None:
        if any(out.glob("*.tar")):
            raise UserError(f"{out} holds shards that were not packed here; name another output folder")
        _write_json(out / _PLAN, plan)
    for shard in shards:
        for left_over in out.glob(f"{shard.path.name}.*.part"):
            left_over.unlink()


def _finish_all(shards: list[_Shard], jobs: int, caption_key: str) -> Iterator[_Shard]:
    if jobs == 1:
        for shard in shards:
            yield _finish(shard, caption_key)
        return
    with ProcessPoolExecutor(min(jobs, len(shards)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_finish, shard, caption_key) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _finish(shard: _Shard, caption_key: str) -> _Shard:
    """Write a shard, or look up what is in it where it was written before."""
    if not shard.path.exists():
        return _write(shard, caption_key)
    index = ShardIndex.load_or_build(shard.path)
    keys = {index.key(number) for number in range(len(index))}
    bad = []
    for source in shard.sources:
        if source.key not in keys:
            try:
                source.read(caption_key)
            except BadSampleError as error:
                bad.append(BadFile(source.file, str(error)))
    return _Shard(shard.path, shard.sources, len(index), index.shard_size, tuple(bad), resumed=True)


def _write(shard: _Shard, caption_key: str) -> _Shard:
    bad: list[BadFile] = []
    try:
        with atomic_file(shard.path) as part:
            samples = _write_tar(part, shard.sources, caption_key, bad)
            if not samples:
                raise _NothingToWriteError
            index = ShardIndex.build(part)
            assert len(index) == samples
    except _NothingToWriteError:
        return _Shard(shard.path, shard.sources, bad=tuple(bad))
    index.moved_to(shard.path).save()
    return _Shard(shard.path, shard.sources, samples, index.shard_size, tuple(bad))


def _write_tar(path: Path, sources: Sequence[PackSource], caption_key: str, bad: list[BadFile]) -> int:
    """Write the good samples, append the others to ``bad``, and return how many were written."""
    samples = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for source in sources:
            try:
                data = source.read(caption_key)
            except BadSampleError as error:
                bad.append(BadFile(source.file, str(error)))
                continue
            for extension, content in data.items():
                archive.addfile(_header(f"{source.key}.{extension}", len(content)), io.BytesIO(content))
            samples += 1
    return samples


def _header(name: str, size: int) -> tarfile.TarInfo:
    """A header without anything that differs between two runs or machines."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mtime = 0
    info.mode = 0o644
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info


def _check_bad(bad: list[BadFile], max_bad: int) -> None:
    if len(bad) > max_bad:
        shown = "".join(f"\n  {file.file}: {file.reason}" for file in bad[:10])
        raise UserError(f"{len(bad)} bad files, more than max_bad={max_bad}; mend them or raise max_bad:{shown}")


def _conclude(out: Path, done: list[_Shard], bad: list[BadFile]) -> PackSummary:
    kept = sorted((shard for shard in done if shard.samples), key=lambda shard: shard.path.name)
    if not kept:
        raise UserError(f"none of {len(bad)} files can be packed, first {bad[0].file}: {bad[0].reason}")
    with atomic_file(out / "bad.jsonl") as part:
        lines = [json.dumps({"file": f.file, "reason": f.reason}) for f in sorted(bad, key=lambda f: f.file)]
        part.write_text("".join(line + "\n" for line in lines))
    samples, size = sum(shard.samples for shard in kept), sum(shard.size for shard in kept)
    manifest = {
        "format": "lit_lora.shards",
        "version": 1,
        "samples": samples,
        "bytes": size,
        "shards": [{"name": s.path.name, "samples": s.samples, "bytes": s.size} for s in kept],
    }
    _write_json(out / "manifest.json", manifest)
    return PackSummary(out, len(kept), sum(shard.resumed for shard in kept), samples, size, bad)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")
