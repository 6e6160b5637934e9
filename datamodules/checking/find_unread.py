"""Count of the members of indexed shards that no index contains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.scan import walk_members
from lit_lora.datamodules.indexing.tar_headers import BLOCK_BYTES
from lit_lora.datamodules.indexing.unread_members import UnreadMembers
from lit_lora.distributed.jobs import run_jobs
from lit_lora.errors import UserError

_MAX_END_BYTES = 20 * 1024  # two blocks of zeros, and padding to a record of 10 KiB


@dataclass
class UnreadKind:
    """Members of one kind in some shards.

    Attributes:
        kind: Description of the kind, in the plural.
        reason: Reason why samples are lost, and what to do; empty for members that are no part of a sample.
        first: Name of the first of them.
        shard: Shard of the first of them.
        count: Number of them in all shards.
    """

    kind: str
    reason: str
    first: str
    shard: str
    count: int = 0


def find_unread(indexes: Sequence[ShardIndex], jobs: int = 1) -> list[UnreadKind]:
    """The members that the indexes of shards pass over, by kind; those of lost samples come first.

    Only shards with bytes that their index does not explain are read.

    Args:
        indexes: Indexes of local shards.
        jobs: Number of processes. Defaults to 1.
    """
    kinds: dict[str, UnreadKind] = {}
    paths = [index.path for index in indexes if _has_more(index)]
    for path, found in zip(paths, run_jobs(_unread_in, ((path,) for path in paths), jobs), strict=True):
        for kind, reason, names in found:
            entry = kinds.setdefault(kind, UnreadKind(kind, reason, names[0], str(path)))
            entry.count += len(names)
    return sorted(kinds.values(), key=lambda entry: not entry.reason)


def _unread_in(path: Path) -> Iterable[tuple[str, str, list[str]]]:
    unread = UnreadMembers()
    with suppress(UserError, OSError), path.open("rb") as file:  # indexing has reported damage
        for _ in walk_members(path, file, unread):
            pass
    found = []
    if unread.lost:
        found.append(("members of samples that are passed over", unread.lost[0].reason, [m.name for m in unread.lost]))
    for extension, names in unread.others.items():
        found.append((f"members that end in .{extension}" if extension else "other members", "", list(names)))
    return found


def _has_more(index: ShardIndex) -> bool:
    """Whether a shard has bytes beside its indexed members, their headers and its end."""
    order = np.argsort(index.member_offset)
    starts: NDArray[np.int64] = index.member_offset[order] - BLOCK_BYTES
    ends: NDArray[np.int64] = index.member_offset[order] + -(-index.member_size[order] // BLOCK_BYTES) * BLOCK_BYTES
    if starts[0] != 0 or bool((starts[1:] != ends[:-1]).any()) or index.shard_size - ends[-1] > _MAX_END_BYTES:
        return True
    try:
        with index.path.open("rb") as file:
            file.seek(int(ends[-1]))
            return bool(file.read(_MAX_END_BYTES).strip(b"\0"))
    except OSError:
        return False
