"""Describes whether a planned run fits into memory."""

from __future__ import annotations

from lit_lora.byte_sizes import format_bytes
from lit_lora.planning.changes import CANDIDATES, ChangedRun
from lit_lora.planning.memory_plan import MemoryPlan


def verdict(planned: MemoryPlan, memory: int, changes: list[ChangedRun] | None) -> str:
    """A sentence that says whether a run fits into memory and, if not, a list of changes that make it fit.

    Args:
        planned: Plan of the run.
        memory: Memory available to the run, in bytes.
        changes: Result of :func:`~lit_lora.planning.changes.cheapest_changes`; used if the run does not fit.
    """
    said = f"{format_bytes(planned.needed)} of {format_bytes(memory)}"
    if planned.fits(memory):
        return f"fits: {said}"
    if changes is None:
        return f"does not fit: {said}, not even with all {len(CANDIDATES)} kinds of changes together"
    lines = [f"does not fit: {said}", "The cheapest changes that make it fit, cumulatively:"]
    for one in changes:
        lines.append(f"  {one.change.description}   needs {format_bytes(one.plan.needed)} ({one.change.price})")
    return "\n".join(lines)
