"""Bounds of a position in the data that was read from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from lit_lora.datamodules.batches.cursor import Cursor, Segment
from lit_lora.datamodules.batches.plan import MAX_PASSES, Plan
from lit_lora.errors import UserError
from lit_lora.redact import redact

_log = logging.getLogger(__name__)

_MAX_BATCHES = 2**40
_MAX_SEGMENTS = 1000
_MAX_GLOBAL_BATCH = 1 << 16
"""Samples in a batch of an earlier run; a damaged number would reserve as much memory for padding."""


def read_cursor(state: Mapping[str, Any], plan: Plan) -> Cursor:
    """The position that a checkpoint holds, after checking that a run over these data can have been there.

    Args:
        state: State of a :class:`~lit_lora.datamodules.loading.loader.PlannedLoader`.
        plan: Plan of the run that continues. It may have another global batch size, and other passes over each chunk.

    Raises:
        UserError: If an entry is missing, or out of its bounds.
    """
    pass_number = read_count(state, "pass", MAX_PASSES - 1)
    position = read_count(state, "chunk_position", plan.num_chunks - 1)
    pass_batches = read_count(state, "pass_batches", _MAX_BATCHES)
    visit_batches = read_count(state, "visit_batches", pass_batches)
    # Each round of a visit has a batch, and slots must not exceed 64 bits.
    slots = plan.chunks.total * plan.chunks.copies * MAX_PASSES
    repeat = read_count(state, "repeat", min(visit_batches, 2**63 // slots - 1))
    segments = _read_segments(state.get("segments"), plan)
    cursor = Cursor(pass_number, position, repeat, pass_batches, visit_batches, segments)
    taken = sum(segment.batches for segment in segments)
    most = min(visit_batches, int(plan.chunks.counts[plan.chunk(cursor)].sum()))
    if taken > most:
        refuse_position("segments", f"{taken} batches in this round", f"at most {most}")
    return cursor


def tell_other_batches(state: Mapping[str, Any], plan: Plan, trainer: Any) -> None:
    """Tell that a resumed run has global batches of another size, unless a callback such as ``AdapterCheckpoint`` tells it.

    Args:
        state: State of the loader that was resumed, which :func:`read_cursor` has checked.
        plan: Plan of the run that continues.
        trainer: Its trainer, or None.
    """
    size, earlier = plan.global_batch_size, state["segments"][-2]
    if size == earlier or any(getattr(one, "tells_changes", False) for one in getattr(trainer, "callbacks", ())):
        return
    _log.warning(
        "the global batch has %d samples, and had %d before this run was resumed, so that the rest of the data is divided into "
        "other batches; change batch_size or the number of processes to keep its size",
        size,
        earlier,
    )


def read_count(state: Mapping[str, Any], name: str, most: int) -> int:
    """An entry of a checkpoint that counts something.

    Raises:
        UserError: If it is no integer in [0, ``most``].
    """
    value = state.get(name)
    if type(value) is not int or not 0 <= value <= most:
        refuse_position(name, repr(value)[:40], f"an integer in [0, {most}]")
    return value


def refuse_position(name: str, value: str, bound: str) -> NoReturn:
    """Refuse the position in a checkpoint.

    Raises:
        UserError: Always.
    """
    raise UserError(
        f"the position in the data that the checkpoint holds is damaged: {name} is {value}, but must be {bound};"
        " resume from another checkpoint, or load only the checkpoint's weights"
    )


@contextmanager
def naming_checkpoint(trainer: Any) -> Iterator[None]:
    """Put the checkpoint that a trainer resumes, or that there is none, before the errors in the block."""
    try:
        yield
    except UserError as error:
        path = getattr(trainer, "ckpt_path", None)
        if trainer is None:
            raise
        if path is None:
            raise UserError(
                f"a datamodule goes on from its earlier fit as from a checkpoint; make a new one to begin anew: {error}"
            ) from error
        raise UserError(f"{redact(str(path))}: {error}") from error


def loader_state(state: Any) -> Any:
    """The train loader's state in that of a datamodule; None if it has none.

    Raises:
        UserError: If the datamodule's state is not a dict.
    """
    if not isinstance(state, Mapping):
        refuse_position("it", repr(state)[:40], "a dict")
    return state.get("train_loader")


def _read_segments(numbers: Any, plan: Plan) -> tuple[Segment, ...]:
    shape = f"a list of pairs, at most {_MAX_SEGMENTS}"
    if not isinstance(numbers, list) or len(numbers) % 2 or not 0 < len(numbers) <= 2 * _MAX_SEGMENTS:
        refuse_position("segments", repr(numbers)[:40], shape)
    most = max(_MAX_GLOBAL_BATCH, plan.global_batch_size)
    segments = []
    for size, batches in zip(numbers[::2], numbers[1::2], strict=True):
        if type(size) is not int or not 1 <= size <= most:
            refuse_position("segments", f"a batch of {repr(size)[:40]} samples", f"an integer in [1, {most}]")
        if type(batches) is not int or not 0 <= batches <= _MAX_BATCHES:
            refuse_position("segments", f"{repr(batches)[:40]} batches", f"an integer in [0, {_MAX_BATCHES}]")
        segments.append(Segment(size, batches))
    return tuple(segments)
