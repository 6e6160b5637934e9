"""What each process of a run has."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; a collective call where there are several."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all are filled
