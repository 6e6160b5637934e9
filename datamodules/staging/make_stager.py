"""Construction of a loader's stager."""

from __future__ import annotations

import secrets
from typing import Any

from lit_lora.byte_sizes import parse_bytes
from lit_lora.datamodules.batches.chunked_samples import ChunkedSamples
from lit_lora.datamodules.staging.stager import StagedShard, Stager, check_budget
from lit_lora.datamodules.staging.staging import Staging
from lit_lora.files import writable_folder


def checked_budget(staging: Staging, chunks: ChunkedSamples) -> int:
    """The budget of staging in bytes, after checking that two chunks fit into it.

    The free disk space is checked when staging starts and the shards that are already staged are known.

    Args:
        staging: Options of staging.
        chunks: Samples whose shards are staged.

    Raises:
        UserError: If the budget is too small or the folder is not writable.
    """
    sizes = sorted(chunks.chunk_bytes.tolist(), reverse=True)
    allowed = sum(sizes[:2]) if staging.budget is None else parse_bytes("chunks.staging.budget", staging.budget)
    check_budget(sizes, allowed)
    writable_folder(staging.dir)
    return allowed


def make_stager(staging: Staging, chunks: ChunkedSamples, seed: int, trainer: Any | None) -> Stager:
    """Construct the stager of this process; all processes of a node share one staging process.

    Args:
        staging: Options of staging.
        chunks: Samples whose shards are staged.
        seed: Seed of the order of the chunks.
        trainer: Lightning trainer of the run; None for a single process.

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
