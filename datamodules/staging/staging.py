"""The options of staging."""

from __future__ import annotations

from dataclasses import dataclass

from lit_lora.byte_sizes import parse_bytes
from lit_lora.errors import UserError


@dataclass(frozen=True)
class Staging:
    """Copies shards to a local disk, a chunk ahead of the training.

    Args:
        dir: Folder on a local disk for the copies.
        budget: Maximum number of bytes in it for each job on the machine, as in ``200GB``; null (default) for what two
            chunks take.

    Raises:
        UserError: If ``dir`` is empty or ``budget`` is not an amount of bytes.
    """

    dir: str
    budget: int | str | None = None

    def __post_init__(self) -> None:
        if not self.dir:
            raise UserError("chunks.staging.dir is empty; name a folder on a local disk")
        if self.budget is not None:
            parse_bytes("chunks.staging.budget", self.budget)
