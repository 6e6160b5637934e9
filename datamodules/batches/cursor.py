"""A place in a plan, as plain integers that a checkpoint can keep."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """A number of consecutive batches that were taken with the same global batch size."""

    global_batch_size: int
    batches: int


class Cursor(NamedTuple):
    """A place in the run, before a batch.

    A pass visits each chunk once; a visit goes through the chunk's samples once or more: its rounds.

    Attributes:
        pass_number: Number of the pass, counted from 0.
        position: Position of the visit within the pass, counted from 0.
        repeat: Number of the round within the visit, counted from 0.
        pass_batches: Number of batches taken in this pass.
        visit_batches: Number of batches taken in this visit.
        segments: Batches taken in this round; the last segment has the present global batch size.
    """

    pass_number: int
    position: int
    repeat: int
    pass_batches: int
    visit_batches: int
    segments: tuple[Segment, ...]
