"""Packing of images with captions into tar shards."""

from __future__ import annotations

import math
import os
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.decode import BadSampleError, check_pixels, decode_rgb
from lit_lora.datamodules.decoding.mask import decode_mask
from lit_lora.datamodules.decoding.source_image import decode_source
from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.datamodules.indexing.extensions import MASK_EXTENSION, SOURCE_EXTENSIONS
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.manifest import write_manifest
from lit_lora.datamodules.indexing.scan import image_size
from lit_lora.datamodules.packing.caption_template import CaptionTemplate
from lit_lora.datamodules.packing.find_input import find_input
from lit_lora.datamodules.packing.image_formats import IMAGE_FILES, to_shard_format
from lit_lora.datamodules.packing.input import PackInput
from lit_lora.datamodules.packing.left_out import BadFile, count_files, list_first, write_left_out
from lit_lora.datamodules.packing.pack_plan import claim, remove_left_overs, write_json
from lit_lora.datamodules.packing.remarks import notes_of, remarks
from lit_lora.datamodules.packing.write_shard import write_shard
from lit_lora.distributed.jobs import run_jobs
from lit_lora.draws import seed_of
from lit_lora.errors import UserError, check_least, check_whole
from lit_lora.folder_lock import only_run_in
from lit_lora.visible import visible

_BAD = "bad.jsonl"


@dataclass(frozen=True)
class PackSummary:
    """The result of packing.

    Attributes:
        folder: Folder of the shards.
        shards: Number of shards.
        resumed: Number of shards that an earlier run had written.
        samples: Number of samples in all shards.
        size: Total size of the shards in bytes.
        bad: Files and samples that were left out because they cannot be used.
        skipped: Files that were left out for another reason, such as images that no table lists.
        notes: Remarks for the user; those on single samples only of the shards that this run has written.
    """

    folder: Path
    shards: int
    resumed: int
    samples: int
    size: int
    bad: list[BadFile]
    skipped: list[BadFile]
    notes: list[str]


@dataclass(frozen=True)
class _Shard:
    """The result of packing one shard."""

    path: Path
    samples: int
    size: int
    bad: tuple[BadFile, ...]
    remarks: tuple[BadFile, ...] = ()
    resumed: bool = False


def pack_folder(
    source: str | Path,
    out: str | Path,
    *,
    samples_per_shard: int = 10_000,
    max_shard_bytes: int = 1_000_000_000,
    jobs: int = 1,
    shuffle_seed: int | None = None,
    max_bad: float = 0,
    caption_key: str = "caption",
    image_column: str | None = None,
    caption_column: str | None = None,
    captions: str | CaptionTemplate | None = None,
    prefix: str = "shard",
    fallback: str | None = None,
    caption_extension: str | None = None,
    is_set: bool = False,
    sources: str | Path | None = None,
    source_column: str | None = None,
) -> PackSummary:
    """Pack images with captions into tar shards, whose bytes depend on the input and the options but not on ``jobs``.

    JPEG, PNG and WebP images are packed as they are; other formats that Pillow reads become PNG.

    Beside the shards and their indexes, ``out`` contains ``plan.json`` (a digest of input and options), ``bad.jsonl`` (what was
    left out, and why), ``shardindex.json`` and ``sizes.json`` (for wids and open_clip), ``shards.index`` (the index of all
    shards) and, written last, ``manifest.json``. An interrupted run continues when it is started again.

    Args:
        source: Folder of images with a ``.txt`` or ``.json`` of the same name, at any depth; of images that
            ``metadata.jsonl``, ``.csv`` or ``.parquet`` files list; of tar shards, for example from img2dataset; of Parquet
            files; or written by ``save_to_disk`` of ``datasets``. Or a single table or shard.
        out: Folder for the shards.
        samples_per_shard: Maximum number of samples in a shard. Defaults to 10,000.
        max_shard_bytes: Maximum size of a shard in bytes, which only a single sample may exceed. Sizes of images inside
            tables, and of those that become PNG, are estimated. Defaults to 1 GB.
        jobs: Number of processes, each of which packs one shard at a time. Defaults to 1. With more than one, a script that
            calls this needs ``if __name__ == "__main__":``.
        shuffle_seed: Seed of a random order of the samples. Parquet files are shuffled by blocks of rows, and within the
            blocks. Defaults to None: sorted by name, or in the order of a table.
        max_bad: Maximum number of files that are left out because they are damaged or have no caption; below 1, their maximum
            share of all samples, rounded up to whole files. Defaults to 0.
        caption_key: Key of the caption in ``.json`` files. Defaults to "caption".
        image_column: Column of images, or of their paths, in tables. Defaults to None: a column with a usual name.
        caption_column: Column of captions in tables. Defaults to None: a column with a usual name.
        captions: Caption of every image of a folder, in place of captions in files: a text in which ``{name}`` and ``{folder}``
            stand for the words of the image's and the folder's name (:class:`CaptionTemplate`). Defaults to None: they are read.
        prefix: Prefix of the names of the shards. Defaults to "shard".
        fallback: Caption of a folder's images without a caption file. Defaults to None: these images are bad.
        caption_extension: Ending of the caption files beside images: ``txt``, ``json`` or ``caption``. Defaults to None: any.
        is_set: Whether the folder is one of several sets, with repeats of its own, so that no note is due about a number in its
            name. Defaults to False.
        sources: Folder of the source images of editing pairs, at the same places and with the same names as their targets in
            ``source``. Defaults to None: sources are beside their targets, or in a table.
        source_column: Column of source images, or of their paths, in tables. Defaults to None: ``source_file_name``; or beside a
            column with a name such as ``edited_image`` one with a name such as ``input_image``.

    Raises:
        UserError: If an argument is out of bounds, there is nothing to pack, more than ``max_bad`` files are bad, or
            ``out`` holds other shards.
    """
    source, out = Path(source), Path(out)
    sources = None if sources is None else Path(sources)
    check_whole(1, samples_per_shard=samples_per_shard, max_shard_bytes=max_shard_bytes, jobs=jobs)
    check_least(0, max_bad=max_bad)
    if max_bad > 1 and not float(max_bad).is_integer():
        raise UserError(f"max_bad={max_bad} is no number of files; give a whole number, or a share below 1")
    _check_names(source, out, prefix)
    columns: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column}
    columns["caption_key"] = caption_key
    pairs: dict[str, Any] = {"sources": sources, "source_column": source_column}
    template = CaptionTemplate(captions) if isinstance(captions, str) else captions
    beside: dict[str, Any] = {"fallback": fallback, "caption_extension": caption_extension}
    samples = find_input(source, out, jobs=jobs, template=template, is_set=is_set, **columns, **beside, **pairs)
    order = _order(samples, shuffle_seed)
    shards = _name_shards(out, prefix, _group(samples.sizes, order, samples_per_shard, max_shard_bytes))
    absolute = {} if sources is None else {"sources": sources.absolute()}
    options = [str(source.absolute()), prefix, samples_per_shard, max_shard_bytes, shuffle_seed, *columns.values()]
    options += _later_options(template, beside | pairs | absolute)
    most = math.ceil(max_bad * (len(samples) + count_files(samples.bad)) if max_bad < 1 else max_bad)
    with only_run_in(out, "pack"):
        if count_files(samples.bad) <= most:
            claim(out, list(shards), samples.fingerprint, options)
        return _pack(out, samples, shards, caption_key, jobs, most)


def _later_options(template: CaptionTemplate | None, options: Mapping[str, Any]) -> list[str]:
    """Entries of a plan for options that plans of earlier versions do not have; without the option there is no entry."""
    text = [] if template is None else [template.text]
    return text + [f"{name}={value}" for name, value in options.items() if value is not None]


def _name_shards(out: Path, prefix: str, groups: list[NDArray[np.int64]]) -> dict[Path, NDArray[np.int64]]:
    digits = max(6, len(str(len(groups))))
    return {out / f"{prefix}-{number:0{digits}}.tar": group for number, group in enumerate(groups)}


def _check_names(source: Path, out: Path, prefix: str) -> None:
    if not prefix or set(prefix) & set("/*?[]{}"):
        raise UserError(f"prefix={prefix!r} cannot be part of a file name; use letters, digits and -")
    if os.path.realpath(source) == os.path.realpath(out):
        raise UserError(f"out={visible(out)} is also the source; name another output folder")


def _pack(
    out: Path, samples: PackInput, shards: dict[Path, NDArray[np.int64]], caption_key: str, jobs: int, max_bad: int
) -> PackSummary:
    """Write all shards, each with the samples of the given numbers, and then the files beside them.

    When too many files are bad, the other samples are only checked, so that ``bad.jsonl`` is complete.
    """
    bad = [*samples.bad]
    done: list[_Shard] = []

    def work() -> Iterator[tuple[Path, PackInput, str, bool]]:
        for path, group in shards.items():
            yield path, samples.select(group), caption_key, count_files(bad) <= max_bad

    with tqdm(total=len(samples), desc="packing", unit="sample", leave=False, disable=None) as bar:
        for shard, group in zip(run_jobs(_finish, work(), jobs), shards.values(), strict=True):
            done.append(shard)
            bad += shard.bad
            if (number := count_files(bad)) > max_bad:
                bar.set_description("checking the rest")
            bar.update(len(group))
    left_out = [*bad, *samples.skipped]
    write_left_out(out / _BAD, left_out)
    if (number := count_files(bad)) > max_bad:
        files = "file" if number == 1 else "files"
        raise UserError(
            f"{number} bad {files}, more than max_bad={max_bad}; repair or remove what is bad, or set max_bad to {number} to "
            f"leave it out ({visible(out / _BAD)} lists all):{list_first(bad)}"
        )
    summary = _conclude(out, done, samples, bad)
    remove_left_overs(out, list(shards))  # once more: the processes of a killed run end a moment after it
    return summary


def _order(samples: PackInput, seed: int | None) -> NDArray[np.int64]:
    if seed is None:
        return np.arange(len(samples))
    order = np.random.default_rng(seed_of(seed, "pack")).permutation(len(samples))
    if samples.blocks is None:
        return order
    count = int(samples.blocks.max(initial=-1)) + 1
    places = np.random.default_rng(seed_of(seed, "pack blocks")).permutation(count)
    return order[np.argsort(places[samples.blocks[order]], kind="stable")]


def _group(sizes: NDArray[np.int64], order: NDArray[np.int64], most: int, most_bytes: int) -> list[NDArray[np.int64]]:
    """Divide the ordered samples into shards."""
    groups = []
    ends = np.cumsum(sizes[order])
    start = 0
    while start < len(order):
        before = int(ends[start - 1]) if start else 0
        by_bytes = int(np.searchsorted(ends, before + most_bytes, "right"))
        end = max(start + 1, min(start + most, by_bytes))
        groups.append(order[start:end])
        start = end
    return groups


def _finish(path: Path, samples: PackInput, caption_key: str, write: bool) -> _Shard:
    """Write a shard, or read the result of an existing one, or only check the samples."""
    if not write:
        bad: list[BadFile] = []
        deque(_good(samples, caption_key, bad, []), maxlen=0)
        return _Shard(path, 0, 0, tuple(bad))
    if not path.exists():
        return _write(path, samples, caption_key)
    index = ShardIndex.load_or_build(path)
    keys = {index.key(number) for number in range(len(index))}
    bad = []
    for sample in range(len(samples)):
        if samples.key(sample) not in keys:
            try:
                _read(samples, sample, caption_key)
            except BadSampleError as error:
                bad.append(BadFile(samples.name(sample), str(error)))
    return _Shard(path, len(index), index.shard_size, tuple(bad), resumed=True)


def _write(path: Path, samples: PackInput, caption_key: str) -> _Shard:
    bad: list[BadFile] = []
    remarked: list[BadFile] = []
    index = write_shard(path, _good(samples, caption_key, bad, remarked), tarfile.USTAR_FORMAT)
    if index is None:
        return _Shard(path, 0, 0, tuple(bad))
    return _Shard(path, len(index), index.shard_size, tuple(bad), tuple(remarked))


def _good(
    samples: PackInput, caption_key: str, bad: list[BadFile], remarked: list[BadFile]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members of the good samples; bad samples are appended to ``bad``, remarks on good ones to ``remarked``."""
    for sample in range(len(samples)):
        try:
            members = _read(samples, sample, caption_key)
        except BadSampleError as error:
            bad.append(BadFile(samples.name(sample), str(error)))
        else:
            remarked += remarks(samples.name(sample), members, caption_key, samples.may_be_empty)
            yield samples.key(sample), members


def _read(samples: PackInput, sample: int, caption_key: str) -> dict[str, bytes]:
    """Read the members of a sample and check that training will accept them.

    Raises:
        BadSampleError: If the image or the caption cannot be used.
    """
    members = samples.members(sample)
    extension = next(extension for extension in IMAGE_FILES if extension in members)
    name, image = to_shard_format(extension, members.pop(extension))
    check_pixels(*image_size(image))
    decode_rgb(image)
    if len(named := [one for one in members if one.startswith("source.")]) > 1:
        raise BadSampleError(f"has more than one source ({', '.join(named)}); remove all but one")
    members = {name: image, **dict(starmap(_source_in_shard_format, members.items()))}
    if MASK_EXTENSION in members:
        decode_mask(members, "mask.png", image_size(image))
    if any(extension in members for extension in SOURCE_EXTENSIONS):
        decode_source(members, image_size(image))
    Captions.anywhere(caption_key).draw(members, seed=0, slot=0)
    return members


def _source_in_shard_format(name: str, data: bytes) -> tuple[str, bytes]:
    """A source image as shards hold it; other members as they are."""
    if not name.startswith("source.") or name in SOURCE_EXTENSIONS:
        return name, data
    try:
        extension, data = to_shard_format(name.removeprefix("source."), data)
    except BadSampleError as error:
        raise BadSampleError(f"source image: {error}") from error
    return f"source.{'jpg' if extension == 'jpeg' else extension}", data


def _conclude(out: Path, done: list[_Shard], samples: PackInput, bad: list[BadFile]) -> PackSummary:
    kept = [shard for shard in done if shard.samples]
    if not kept:
        left_out = [*bad, *samples.skipped]
        first = f", first {visible(left_out[0].file)}: {visible(left_out[0].reason)}" if left_out else ""
        raise UserError(f"none of {count_files(left_out)} files can be packed{first}; {visible(out / _BAD)} lists all")
    _write_wids(out / "shardindex.json", kept)
    write_json(out / "sizes.json", {shard.path.name: shard.samples for shard in kept})
    DataIndex.load_or_build([shard.path for shard in kept])
    count, size = sum(shard.samples for shard in kept), sum(shard.size for shard in kept)
    write_manifest(out, ((shard.path.name, shard.samples, shard.size) for shard in kept))
    resumed = sum(shard.resumed for shard in kept)
    notes = [*samples.notes, *notes_of([remark for shard in done for remark in shard.remarks])]
    return PackSummary(out, len(kept), resumed, count, size, bad, list(samples.skipped), notes)


def _write_wids(path: Path, shards: Sequence[_Shard]) -> None:
    """Write the index for webdataset's wids, in the format of its command ``widsindex``."""
    shard_list = [{"url": s.path.name, "nsamples": s.samples, "filesize": s.size} for s in shards]
    write_json(path, {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shard_list})
