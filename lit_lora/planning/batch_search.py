"""Finds the largest batch that fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.plan_run import plan
from lit_lora.planning.run import Run

_LARGEST = 4096


def largest_batch(
    run: Run, device_memory: int, planned: MemoryPlan | None = None, tell: Callable[[str], object] = str
) -> MemoryPlan | None:
    """The plan with the largest batch size that fits; None if not even one sample fits.

    Memory grows almost linearly with the batch size. So lines through two known plans predict which size to plan next, until
    one size fits and the next larger one does not.

    Args:
        run: The run; its own batch size does not matter.
        device_memory: Memory of the device in bytes.
        planned: Plan of ``run``, if it is known already; made here by default.
        tell: Function that is told of each batch size before it is planned. Defaults to one that does nothing.

    Raises:
        UserError: If the run cannot be planned: see :func:`~lit_lora.planning.plan_run.plan`.
    """
    known = {} if planned is None else {run.batch_size: planned}

    def of(size: int) -> MemoryPlan:
        if size not in known:
            tell(f"with batch size {size}")
            known[size] = plan(replace(run, batch_size=size))
        return known[size]

    if not of(1).fits(device_memory):
        return None
    fits, too_large = 1, _LARGEST + 1
    of(2)
    while True:
        fits = max(size for size, found in known.items() if found.fits(device_memory))
        too_large = min([size for size, found in known.items() if not found.fits(device_memory)] or [too_large])
        if too_large - fits == 1:
            return known[fits]
        guess = _on_the_line(known, device_memory)
        # Bisection guarantees that the search ends if memory does not grow linearly.
        if not fits < guess < too_large or len(known) > 6:
            guess = min(fits * 2, (fits + too_large) // 2) if too_large > _LARGEST else (fits + too_large) // 2
        of(max(fits + 1, min(guess, too_large - 1)))


def _on_the_line(known: dict[int, MemoryPlan], device_memory: int) -> int:
    """The batch size at which the two nearest plans predict full memory, or the next size if that one is planned already.

    Each phase has a line of its own: drawing images may have the peak, whatever the batch size, until training has it.
    """
    low, high = sorted(sorted(known, key=lambda size: abs(device_memory - known[size].needed))[:2])
    before, after = known[low], known[high]
    allowed = device_memory - (after.needed - after.peak)
    guesses = [_LARGEST]
    for phase, kinds in after.phases.items():
        size = sum(before.phases[phase].values())
        slope = (sum(kinds.values()) - size) / (high - low)
        if slope > 0:
            guesses.append(int(low + (allowed - size) / slope))
    return min(guesses) + 1 if min(guesses) in known else min(guesses)
