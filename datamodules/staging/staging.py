"""The options of staging."""

from __future__ import annotations

from dataclasses import dataclass

from lit_lora.argument_types import check_types
from lit_lora.byte_sizes import parse_bytes
from lit_lora.errors import UserError


@dataclass(frozen=True)
class Staging:
    """Options for copying shards to a local disk, one chunk ahead of training.

    Args:
        dir: Folder on a local disk for the copies.
        budget: Maximum size of the copies for each job on the machine, as in ``200GB``. Defaults to null: the size of the two
            largest chunks.

    Raises:
        UserError: If ``dir`` is empty or ``budget`` is not a byte size.
    """

    dir: str
    budget: int | str | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not self.dir:
            raise UserError("chunks.staging.dir is empty; name a folder on a local disk")
        if self.budget is not None:
            parse_bytes("chunks.staging.budget", self.budget)
