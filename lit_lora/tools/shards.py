"""``lit-lora shards``: packs, indexes, checks and describes WebDataset shards."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_lora.errors import UserError, check_least
from lit_lora.visible import visible

if TYPE_CHECKING:
    from lit_lora.datamodules.checking.check import CheckSummary
    from lit_lora.datamodules.indexing.index import ShardIndex
    from lit_lora.datamodules.packing.pack import PackSummary
    from lit_lora.datamodules.packing.pack_sets import PackedSets


def pack(
    source: str | list[str],
    out: str,
    samples_per_shard: int = 10_000,
    max_shard_bytes: int = 1_000_000_000,
    jobs: int = 1,
    shuffle_seed: int | None = None,
    max_bad: float = 0,
    caption_key: str = "caption",
    image_column: str | None = None,
    caption_column: str | None = None,
    captions: str | None = None,
    prefix: str = "shard",
    sources: str | None = None,
    source_column: str | None = None,
) -> None:
    """Pack images with captions into tar shards.

    JPEG, PNG and WebP images are packed as they are; other formats become PNG. What is left out is counted and named. The
    number of jobs does not change the shards. An interrupted run continues when it is started again.

    Args:
        source: Folder with images and a .txt or .json file of the same name for each, at any depth; or with images that
            metadata.jsonl or metadata.csv files list; or with tar shards or parquet files; or one that
            datasets.save_to_disk wrote. Or one tar or parquet file, or a .csv, .tsv or .jsonl file with paths of images.
            Or several sets, each packed into a folder in out: a list of folders, a folder of folders named 10_name, or a
            dataset.toml, as for kohya's scripts.
        out: Folder for the shards.
        samples_per_shard: Maximum number of samples in a shard.
        max_shard_bytes: Maximum size of a shard in bytes; only a shard of one sample may exceed it.
        jobs: Number of processes that pack, each one shard at a time.
        shuffle_seed: Seed of a random order; defaults to the order of names, or of a table's rows.
        max_bad: Maximum number of files that may be left out because they are damaged or have no caption; below 1, their share
            of all files, rounded up.
        caption_key: Key of the caption in .json files.
        image_column: Column of a table that holds images or their paths; defaults to a column with a common name.
        caption_column: Column of a table that holds captions; defaults to a column with a common name.
        captions: Caption of every image of a folder, in place of captions in files: a text such as "a photo of a {folder}",
            in which {name} and {folder} stand for the words of the image's and of its folder's name.
        prefix: Start of the shards' names.
        sources: Folder of the source images of editing pairs: the source of a/1.jpg in the folder to pack is a/1.jpg or
            a/1.png there. Without it, sources are beside their targets (1.source.jpg) or in a column of a table.
        source_column: Column of a table that holds source images of editing pairs or their paths; defaults to source_file_name,
            or to input_image and similar names beside edited_image and similar ones.

    Raises:
        UserError: If the source cannot be read, an option is outside its range, or more than ``max_bad`` files are bad.
    """
    from lit_lora.datamodules.packing.pack import pack_folder
    from lit_lora.datamodules.packing.pack_sets import find_sets, pack_sets

    options: dict[str, Any] = {
        "samples_per_shard": samples_per_shard,
        "max_shard_bytes": max_shard_bytes,
        "jobs": jobs,
        "shuffle_seed": shuffle_seed,
        "max_bad": max_bad,
        "caption_key": caption_key,
        "image_column": image_column,
        "caption_column": caption_column,
        "captions": captions,
        "prefix": prefix,
        "source_column": source_column,
    }
    if (found := find_sets(source, out)) is not None:
        if sources is not None:
            raise UserError(
                f"sources={visible(sources)} is for one folder, and here are several sets; pack them one by one"
            )
        packed = pack_sets(found, out, **options)
        fit = ("--config", str(packed.config))
        print("\n".join([*sets_lines(packed), _next(*fit)]))
    else:
        assert isinstance(source, str)  # a list is sets
        print("\n".join(_pack_lines(pack_folder(source, out, sources=sources, **options))))


def sets_lines(packed: PackedSets) -> list[str]:
    """Lines that list packed sets, what was left out of them, and the notes."""
    from lit_lora.datamodules.packing.left_out import format_reasons
    from lit_lora.datamodules.packing.pack_sets import set_rows
    from lit_lora.report_text import format_note, format_reason, format_table

    lines = format_table(set_rows(packed))
    done = zip((one.name for one in packed.found.sets), packed.summaries, strict=True)
    for name, summary in (*done, *((f"validation/{name}", found) for name, found in packed.held_out.items())):
        reasons = [*map(format_reason, format_reasons([*summary.bad, *summary.skipped]))]
        lines += (
            [f"left out of {visible(name)} (see {visible(summary.folder / 'bad.jsonl')})", *reasons] if reasons else []
        )
        lines += [format_note(f"{visible(name)}: {note}") for note in summary.notes]
    return [*lines, *map(format_note, packed.found.notes)]


def _pack_lines(summary: PackSummary) -> list[str]:
    from lit_lora.datamodules.packing.left_out import count_files, format_reasons
    from lit_lora.report_text import format_note, format_written

    left_out = [*summary.bad, *summary.skipped]
    folder = visible(summary.folder)
    numbers = (summary.shards, summary.resumed, summary.samples, summary.size, count_files(left_out))
    written = format_written(*numbers, visible(summary.folder / "bad.jsonl"))
    fit = _next("--data.init_args.train_shards", folder)
    return [written, *format_reasons(left_out), *map(format_note, summary.notes), fit]


def _next(option: str, value: str) -> str:
    """The next command, over two lines, since a path may be long."""
    from lit_lora.report_text import format_next

    return format_next("lit-lora fit --config configs/sd15.yaml", f"{option} {shlex.quote(value)}")


def index(shards: str | list[str], jobs: int = 1) -> None:
    """Index shards: write one index file beside each shard, and shards.index for all shards of a folder.

    Training indexes shards that have no index; do it beforehand for many shards, or before they are copied to a server.
    Shards with an up-to-date index are not read again.

    Shards named by URLs are read once, a few at a time; their index stays on this machine, where training finds it.

    Args:
        shards: Paths of .tar files, folders, globs in quotes, braces as in data/shard-{000000..000099}.tar; or a list of
            these. Or URLs of them; for http no folders and no globs.
        jobs: Number of processes that index, each one shard at a time.

    Raises:
        UserError: If a shard is missing or damaged, local shards and URLs are mixed, or the index cannot be saved.
    """
    from lit_lora.datamodules.indexing.data_index import DataIndex
    from lit_lora.datamodules.indexing.index import index_folders
    from lit_lora.datamodules.remote.transfer import is_remote
    from lit_lora.report_text import format_reason

    specs = [shards] if isinstance(shards, str) else shards
    if any(map(is_remote, specs)):
        _index_remote(specs, jobs)
        return
    indexes = _load_indexes(shards, jobs)
    print(f"shards   {len(indexes):,}")
    print(f"samples  {sum(map(len, indexes)):,}")
    unread = _unread_lines(indexes, jobs)
    for title, line in zip(["unread   ", *[" " * 9] * len(unread)], unread, strict=False):
        print(format_reason(f"{title}{line}", indent=9))
    folders: dict[Path, list[Path]] = {}
    for found in indexes:
        folders.setdefault(found.path.parent, []).append(found.path)
    for folder, paths in folders.items():
        file = DataIndex.load_or_build(paths).file
        if file is None:
            places = " nor in ".join(str(visible(place)) for place in index_folders(folder))
            raise UserError(
                f"the index can be saved neither in {places}; free some space, or make one of them writable"
            )
        print(f"index    {visible(file)}")


def check(
    shards: str | list[str],
    jobs: int = 1,
    decode: bool = True,
    caption_key: str = "caption",
    report: str | None = None,
) -> None:
    """Check shards and all their samples: structure, images, captions. The exit status is 1 if there are problems.

    Args:
        shards: Paths of .tar files, folders, globs in quotes, braces as in data/shard-{000000..000099}.tar; or a list of
            these.
        jobs: Number of processes that check, each one shard at a time.
        decode: Whether to decode each image; false reads only the headers of images, which is much faster.
        caption_key: Key of the caption in .json members.
        report: File for a list of all problems, one JSON object per line; defaults to none.

    Raises:
        UserError: If a shard cannot be found.
    """
    from lit_lora.datamodules.checking.check import check_shards
    from lit_lora.datamodules.indexing.shard_paths import find_shards

    paths = find_shards(shards)
    summary = check_shards(
        paths, decode=decode, jobs=jobs, caption_key=caption_key, report=None if report is None else Path(report)
    )
    print("\n".join(_check_lines(summary)))
    if not summary.is_clean:
        sys.exit(1)


def info(
    shards: str | list[str],
    resolution: int | None = None,
    divisor: int = 64,
    max_aspect_ratio: float = 2.0,
    jobs: int = 1,
) -> None:
    """Print statistics of shards: counts, and sizes and aspect ratios of the images.

    Args:
        shards: Paths of .tar files, folders, globs in quotes, braces as in data/shard-{000000..000099}.tar; or a list of
            these.
        resolution: Resolution for which aspect-ratio buckets are listed too; defaults to no list.
        divisor: Divisor of the buckets' heights and widths, in pixels.
        max_aspect_ratio: Maximum ratio of a bucket's long side to its short side.
        jobs: Number of processes that index shards without an index.

    Raises:
        UserError: If a shard is missing or damaged, or an option is outside its range.
    """
    from lit_lora.datamodules.batches.buckets import AspectRatioBuckets, Bucketing
    from lit_lora.datamodules.checking.shard_statistics import ShardStatistics
    from lit_lora.report_text import format_reason, format_table

    check_least(1, resolution=resolution)
    buckets = AspectRatioBuckets(divisor, max_aspect_ratio)
    bucketing = None if resolution is None else Bucketing.of(resolution, buckets)
    indexes = _load_indexes(shards, jobs)
    numbers = ShardStatistics.of(indexes)
    tables = [numbers.total_rows(), numbers.member_rows()]
    if numbers.is_known.any():
        tables += [numbers.size_rows(), numbers.aspect_rows()]
        tables += [] if bucketing is None else [numbers.bucket_rows(bucketing)]
    lines = ["\n".join(format_table(table)) for table in tables]
    unread = _unread_lines(indexes, jobs)
    print("\n\n".join([*lines, "\n".join(["not read", *map(format_reason, unread)])] if unread else lines))


def _index_remote(specs: list[str], jobs: int) -> None:
    from lit_lora.datamodules.indexing.data_index import DataIndex
    from lit_lora.datamodules.indexing.remote_index import index_remote
    from lit_lora.datamodules.remote.transfer import is_remote
    from lit_lora.redact import redact

    local = next((spec for spec in specs if not is_remote(spec)), None)
    if local is not None:
        raise UserError(f"{local} is local and {redact(next(filter(is_remote, specs)))} is not; index them separately")
    check_least(1, jobs=jobs)
    for folder, file in index_remote(specs, jobs).items():
        made = DataIndex.load(file)
        print(f"folder   {folder}")
        print(f"shards   {len(made.names):,}")
        print(f"samples  {len(made):,}")
        print(f"index    {file}\n")
    print("For other machines, copy each index beside its shards as shards.index.")


def _load_indexes(specs: str | list[str], jobs: int) -> list[ShardIndex]:
    """Load the indexes of shards, and build those that are missing."""
    from lit_lora.datamodules.indexing.data_index import DataIndex
    from lit_lora.datamodules.indexing.shard_paths import find_shards

    check_least(1, jobs=jobs)
    folders: dict[Path, list[Path]] = {}
    for path in find_shards(specs):
        folders.setdefault(path.parent, []).append(path)
    found: list[ShardIndex] = []
    problems: list[str] = []
    for paths in folders.values():
        try:
            combined = DataIndex.load_or_build(paths, jobs)
        except UserError as error:
            problems.append(str(error))
            continue
        rows = {name: row for row, name in enumerate(combined.names)}
        found += [combined.shard(rows[path.name], path) for path in paths]
    if problems:
        raise UserError("\n".join(problems))
    return found


def _unread_lines(indexes: list[ShardIndex], jobs: int) -> list[str]:
    """Lines that count and name the members of shards that no index contains."""
    from lit_lora.datamodules.checking.find_unread import find_unread

    lines = []
    for unread in find_unread(indexes, jobs):
        why = f" ({unread.reason})" if unread.reason else ""
        lines.append(f"{unread.count:,} {unread.kind}, first {visible(unread.first)} in {visible(unread.shard)}{why}")
    return lines


def _check_lines(summary: CheckSummary) -> list[str]:
    from lit_lora.datamodules.checking.check import NOTES
    from lit_lora.report_text import format_reason, format_table

    lines = format_table([["shards", f"{summary.shards:,}"], ["samples", f"{summary.samples:,}"]])
    if not summary.counts:
        return [*lines, "", "no problems found"]
    kinds = sorted(summary.counts, key=lambda kind: (kind in NOTES, -summary.counts[kind], kind))
    names = [f"note: {kind}" if kind in NOTES else kind for kind in kinds]
    counts = [f"{summary.counts[kind]:,}" for kind in kinds]
    header, *rows = format_table([["problem", "count"], *map(list, zip(names, counts, strict=True))])
    lines += ["", header]
    for row, kind in zip(rows, kinds, strict=True):
        lines.append(row)
        for problem in summary.examples[kind]:
            where = ": ".join(map(visible, filter(None, (problem.shard, problem.key))))
            detail = f" ({visible(problem.detail)})" if problem.detail else ""
            lines.append(format_reason(f"    {where}{detail}", indent=8))
    return lines
