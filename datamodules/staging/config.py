"""The configuration of the staging process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StagerConfig:
    """The configuration of a stager, which it reads from its standard input as one line of JSON.

    Attributes:
        folder: Where slots and job files are.
        budget: The most bytes of shards.
        locations: Paths or URLs of the shards.
        sizes: Their bytes.
        chunks: The shard numbers of each chunk.
        seed: Decides the order of the chunks.
        shuffle: Whether the chunks are shuffled.
        job: A name that the processes of a job and their stager share.
        local_world_size: How many processes read the shards.
        visit: The first visit.
        parent: The process that started the stager and that it ends with.
        by_main_thread: Whether the main thread of that process did so.
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
