"""Whether a planned run fits into memory, in words."""

from __future__ import annotations

from lit_lora.byte_sizes import format_bytes
from lit_lora.planning.changes import CANDIDATES, ChangedRun
from lit_lora.planning.memory_plan import MemoryPlan


def verdict(planned: MemoryPlan, memory: int, changes: list[ChangedRun] | None) -> str:
    """Whether a run fits into memory and, if not, which changes make it fit.

    Args:
        planned: The run's plan.
        memory: Bytes that the run may take.
        changes: What :func:`~lit_lora.planning.changes.cheapest_changes` found; used where the run does not fit.
    """
    said = f"{format_bytes(planned.needed)} of {format_bytes(memory)}"
    if planned.fits(memory):
        return f"fits: {said}"
    if changes is None:
        return (
            f"does not fit: {said}, and all of the {len(CANDIDATES)} known kinds of changes together do not make it fit"
        )
    lines = [f"does not fit: {said}. The cheapest changes that make it fit, cumulatively:"]
    for one in changes:
        lines.append(f"  {one.change.arguments}   needs {format_bytes(one.plan.needed)} ({one.change.price})")
    return "\n".join(lines)
