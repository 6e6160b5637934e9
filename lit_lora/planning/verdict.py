"""Describes whether a planned run fits into memory."""

from __future__ import annotations

from lit_lora.byte_sizes import format_bytes
from lit_lora.planning.changes import CANDIDATES, ChangedRun
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.planned_memory import PlannedMemory


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


def cache_verdict(planned: PlannedMemory, memory: int) -> str | None:
    """What to do about a cache whose encoders do not fit into memory; None if they do.

    Args:
        planned: Result of :func:`~lit_lora.planning.cache_plan.plan_cache`.
        memory: Memory available to ``lit-lora cache``, in bytes.
    """
    if planned.fits(memory):
        return None
    quantized = (
        "" if planned.peak_phase == "vae" else ", --model.memory.text_encoder_quantization lit_lora.quantization.NF4"
    )
    return (
        f"lit-lora cache does not fit: {format_bytes(planned.needed)} of {format_bytes(memory)}, the most in "
        f"{planned.peak_phase};\ngive it a smaller --batch_size{quantized}, or --device cpu"
    )
