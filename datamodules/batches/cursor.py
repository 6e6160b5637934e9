"""A position in a plan, as plain integers for checkpoints."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """A number of consecutive batches that were taken with the same global batch size."""

    global_batch_size: int
    batches: int


class Cursor(NamedTuple):
    """The position of a batch in the run.

    A pass visits each chunk once. A visit consists of one or more rounds, each of which takes every sample of the chunk once.

    Attributes:
        pass_number: Number of the pass, counted from 0.
        position: Position of the visit within the pass, counted from 0.
        repeat: Number of the round within the visit, counted from 0.
        pass_batches: Number of batches taken in this pass.
        visit_batches: Number of batches taken in this visit.
        segments: Batches taken in this round; the last segment has the current global batch size.
    """

    pass_number: int
    position: int
    repeat: int
    pass_batches: int
    visit_batches: int
    segments: tuple[Segment, ...]
