"""Check of shards and their samples before training."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_lora.datamodules.checking.check_sample import WRONG_EXTENSION, check_sample
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.indexing.scan import EXTENSIONS, walk_members
from lit_lora.datamodules.indexing.unread_members import UnreadMembers
from lit_lora.datamodules.packing.sample_names import key_digest
from lit_lora.distributed.jobs import run_jobs
from lit_lora.errors import UserError, check_whole
from lit_lora.files import atomic_file, check_regular
from lit_lora.visible import visible

DAMAGED = "damaged shard"
NO_SAMPLES = "no samples"
DUPLICATE_KEY = "duplicate key"
SHARED_KEYS = "keys of another shard"
NOT_READ = "members not read"
PASSED_OVER = "samples passed over"

NOTES = (WRONG_EXTENSION, NOT_READ)
"""Kinds of problems that do not affect training."""

_EXAMPLES = 3

_Members = dict[str, tuple[int, int]]  # offset and size by extension


class Problem(NamedTuple):
    """A problem in a shard.

    Attributes:
        kind: One of the kinds in this module or in ``check_sample``.
        shard: Path of the shard.
        key: Key of the sample or name of the member; empty if the problem concerns the whole shard.
        detail: Description of the problem.
    """

    kind: str
    shard: str
    key: str
    detail: str


@dataclass
class CheckSummary:
    """The result of a check.

    Attributes:
        shards: Number of shards.
        samples: Number of samples in the shards.
        counts: Number of problems of each kind.
        examples: The first problems of each kind.
    """

    shards: int = 0
    samples: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Problem]] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether there are no problems except notes."""
        return set(self.counts) <= set(NOTES)

    def add(self, problem: Problem) -> None:
        """Count a problem."""
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        examples = self.examples.setdefault(problem.kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(problem)


class _ShardReport(NamedTuple):
    problems: list[Problem]
    keys: NDArray[np.uint64]  # digests


def check_shards(
    paths: Sequence[Path],
    *,
    decode: bool = True,
    jobs: int = 1,
    caption_key: str = "caption",
    report: Path | None = None,
) -> CheckSummary:
    """Check shards and all of their samples.

    Args:
        paths: Paths of the shards.
        decode: Whether to decode each image instead of reading only its header. Defaults to True.
        jobs: Number of processes, each of which checks one shard at a time. Defaults to 1. With more than one, a script that
            calls this needs ``if __name__ == "__main__":``.
        caption_key: Key of the caption in ``.json`` members. Defaults to "caption".
        report: File for all problems, one JSON object per line. Defaults to None: no file.

    Raises:
        UserError: If ``jobs`` is below 1, or ``report`` cannot be written.
    """
    check_whole(1, jobs=jobs)
    summary = CheckSummary(shards=len(paths))
    with ExitStack() as stack:
        lines = None
        if report is not None:
            lines = stack.enter_context(stack.enter_context(atomic_file(report)).open("w"))
        for problem in _find_problems(paths, decode, jobs, caption_key, summary):
            summary.add(problem)
            if lines is not None:
                lines.write(json.dumps(problem._asdict() | {"note": problem.kind in NOTES}) + "\n")
    return summary


def _find_problems(
    paths: Sequence[Path], decode: bool, jobs: int, caption_key: str, summary: CheckSummary
) -> Iterator[Problem]:
    keys: list[NDArray[np.uint64]] = []
    reports = run_jobs(_check_shard, ((path, decode, caption_key) for path in paths), jobs)
    for report in tqdm(reports, "checking", len(paths), unit="shard", disable=None):
        keys.append(report.keys)
        summary.samples += len(report.keys)
        yield from report.problems
    yield from _find_shared_keys(paths, keys)


def _check_shard(path: Path, decode: bool, caption_key: str) -> _ShardReport:
    samples: dict[str, _Members] = {}
    captions = Captions.anywhere(caption_key)
    found = _check_file(path, samples, decode, captions)
    problems = [Problem(kind, str(path), key, detail) for kind, key, detail in found]
    return _ShardReport(problems, np.array([key_digest(key) for key in samples], np.uint64))


def _check_file(
    path: Path, samples: dict[str, _Members], decode: bool, captions: Captions
) -> Iterator[tuple[str, str, str]]:
    """Yield kind, key and detail of all problems of a shard, and add its samples to ``samples``."""
    unread = UnreadMembers()
    try:
        check_regular(path)
        with path.open("rb") as file:
            complete = samples
            try:
                for key, detail in _collect(path, file, samples, unread):
                    yield DUPLICATE_KEY, key, detail
                if not samples:
                    yield NO_SAMPLES, "", ""
            except UserError as error:
                yield DAMAGED, "", str(error).removeprefix(f"{visible(path)} is ")
                complete = dict(list(samples.items())[:-1])  # the last sample may lack members
            for lost in unread.lost:
                yield PASSED_OVER, lost.name, lost.reason
            for extension, names in unread.others.items():
                yield (
                    NOT_READ,
                    names[0],
                    f"{len(names)} that end in .{extension}" if extension else f"{len(names)} files",
                )
            for key, members in complete.items():
                for kind, detail in check_sample(file, members, decode, captions):
                    yield kind, key, detail
    except UserError as error:
        yield DAMAGED, "", str(error).removeprefix(f"{path} is ")
    except OSError as error:
        yield DAMAGED, "", f"cannot be read ({error.strerror})"


def _collect(
    path: Path, file: io.BufferedReader, samples: dict[str, _Members], unread: UnreadMembers | None = None
) -> Iterator[tuple[str, str]]:
    """Add offset and size of each sample's members to ``samples``; yield key and detail of repeated ones."""
    last = ""
    repeated = False
    for key, number, offset, size in walk_members(path, file, unread):
        extension = EXTENSIONS[number]
        if key != last:
            repeated = key in samples
            if repeated:
                yield key, f"begins again at byte {offset}"
        elif not repeated and extension in samples[key]:
            yield key, f"has two .{extension} members"
        if not repeated:
            samples.setdefault(key, {}).setdefault(extension, (offset, size))
        last = key


def _find_shared_keys(paths: Sequence[Path], keys: Sequence[NDArray[np.uint64]]) -> Iterator[Problem]:
    """Yield one problem for each shard that repeats keys of earlier shards."""
    digests = np.concatenate(keys)
    starts = np.cumsum([0, *(len(each) for each in keys)])
    order = np.argsort(digests, kind="stable")
    is_new = np.concatenate([[True], digests[order[1:]] != digests[order[:-1]]])[: len(order)]
    first = np.empty(len(order), np.int64)  # the first sample with the same key
    first[order] = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    repeats = np.flatnonzero(first != np.arange(len(order)))
    for number, path in enumerate(paths):
        low, high = np.searchsorted(repeats, starts[number : number + 2])
        if low < high:
            sample = repeats[low]
            other = paths[int(np.searchsorted(starts, first[sample], "right")) - 1]
            detail = f"{high - low} of its {len(keys[number])} keys are in other shards, this one in {other}"
            yield Problem(SHARED_KEYS, str(path), _key_at(path, int(sample - starts[number])), detail)


def _key_at(path: Path, number: int) -> str:
    samples: dict[str, _Members] = {}
    with suppress(UserError), path.open("rb") as file:
        deque(_collect(path, file, samples), maxlen=0)
    return list(samples)[number]
