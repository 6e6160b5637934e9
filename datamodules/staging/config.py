"""The configuration of the staging process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StagerConfig:
    """The configuration of a staging process, which it reads from its standard input as one line of JSON.

    Attributes:
        folder: Folder for slots and job files.
        budget: Maximum total size of the staged shards in bytes.
        locations: Paths or URLs of the shards.
        sizes: Sizes of the shards in bytes.
        chunks: Shard numbers of each chunk.
        seed: Seed of the order of the chunks.
        shuffle: Whether each pass shuffles the chunks.
        job: Name that the processes of a job share.
        local_world_size: Number of processes on this machine that read the shards.
        visit: Number of the first visit.
        parent: Id of the process that started the staging process, which ends when it does.
        by_main_thread: Whether the parent's main thread started it.
    """

    folder: str
    budget: int
    locations: list[str]
    sizes: list[int]
    chunks: list[list[int]]
    seed: int
    shuffle: bool
    job: str
    local_world_size: int
    visit: int
    parent: int
    by_main_thread: bool
