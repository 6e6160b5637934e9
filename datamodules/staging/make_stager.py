"""Construction of the stager for a loader."""

from __future__ import annotations

import secrets
from typing import Any

from lit_lora.byte_sizes import parse_bytes
from lit_lora.datamodules.batches.chunked_samples import ChunkedSamples
from lit_lora.datamodules.staging.stager import StagedShard, Stager, check_budget
from lit_lora.datamodules.staging.staging import Staging
from lit_lora.files import writable_folder


def checked_budget(staging: Staging, chunks: ChunkedSamples) -> int:
    """Maximum number of bytes that staging may take, checked against what two chunks need.

    Free space on the disk is checked later, when staging starts and it is known which shards are there already.

    Args:
        staging: The folder, and what the user allows there.
        chunks: The samples whose shards are staged.

    Raises:
        UserError: If the budget is too small or the folder is not writable.
    """
    sizes = sorted(chunks.chunk_bytes.tolist(), reverse=True)
    allowed = sum(sizes[:2]) if staging.budget is None else parse_bytes("chunks.staging.budget", staging.budget)
    check_budget(sizes, allowed)
    writable_folder(staging.dir)
    return allowed


def make_stager(staging: Staging, chunks: ChunkedSamples, seed: int, trainer: Any | None) -> Stager:
    """The stager of this process; the processes of a node share one.

    Args:
        staging: The folder, and what the user allows there.
        chunks: The samples whose shards are staged.
        seed: Decides the order of the chunks.
        trainer: The Lightning trainer of the run; None for a single process.

    Raises:
        UserError: If the budget is too small or the folder is not writable.
    """
    token = secrets.token_hex(8)
    if trainer is not None:
        token = trainer.strategy.broadcast(token)
    table = chunks.table
    shards = [StagedShard(*row) for row in zip(table.locations, table.shard_size.tolist(), strict=True)]
    return Stager(
        staging.dir,
        checked_budget(staging, chunks),
        shards,
        [part.tolist() for part in chunks.shards],
        seed,
        shuffle=True,
        job=token,
        local_rank=0 if trainer is None else trainer.local_rank,
        local_world_size=1 if trainer is None else trainer.num_devices,
    )
