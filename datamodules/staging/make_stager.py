"""Shards brought to local disk chunk by chunk, for a loader."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from lit_lora.byte_sizes import parse_bytes
from lit_lora.datamodules.batches.chunked_samples import ChunkedSamples
from lit_lora.datamodules.staging.stager import StagedShard, Stager, check_budget
from lit_lora.files import writable_folder


def checked_budget(folder: str | Path, budget: int | str | None, chunks: ChunkedSamples) -> int:
    """The most bytes that staging may take, checked against what two chunks need.

    Whether the disk has them is seen when staging starts, and it is known what of them is there already.

    Args:
        folder: Where shards are staged.
        budget: What the user allows; None for what two chunks need.
        chunks: What is staged.

    Raises:
        UserError: The budget is too small, or the folder not writable.
    """
    sizes = sorted(chunks.chunk_bytes.tolist(), reverse=True)
    allowed = sum(sizes[:2]) if budget is None else parse_bytes("staging_budget", budget)
    check_budget(sizes, allowed)
    writable_folder(folder)
    return allowed


def make_stager(
    folder: str | Path, budget: int | str | None, chunks: ChunkedSamples, seed: int, trainer: Any | None
) -> Stager:
    """The stager of this process; the processes of a node share one.

    Raises:
        UserError: The budget is too small.
    """
    token = secrets.token_hex(8)
    if trainer is not None:
        token = trainer.strategy.broadcast(token)
    table = chunks.table
    shards = [StagedShard(*row) for row in zip(table.locations, table.shard_size.tolist(), strict=True)]
    return Stager(
        folder,
        checked_budget(folder, budget, chunks),
        shards,
        [part.tolist() for part in chunks.shards],
        seed,
        shuffle=True,
        job=token,
        local_rank=0 if trainer is None else trainer.local_rank,
        local_world_size=1 if trainer is None else trainer.num_devices,
    )
