"""The cheapest settings of a run that fit into a memory, found by the planner."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lit_lora.byte_sizes import format_bytes
from lit_lora.errors import UserError
from lit_lora.planning.device import Device
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.tools.training.choices import Settings


class Rung(NamedTuple):
    """A step down the ladder of settings.

    Args:
        changes: Settings that change, in addition to those of all rungs before.
        what: What it does, in a few words.
        price: What it costs.
        on_gpu: Whether it has an effect on GPUs alone.
    """

    changes: dict[str, Any]
    what: str
    price: str
    on_gpu: bool = False


LADDER = (
    Rung({}, "base in its own dtype, whole batches", "nothing"),
    Rung({"gradient_checkpointing": True}, "activations recomputed", "a third more time"),
    Rung({"offload_encoders": True}, "encoders wait in host memory", "copying them when they are used", on_gpu=True),
    Rung({"batch_size": 1}, "batches of one image", "the same gradients in more time"),
    Rung({"quantization": "Int8"}, "base in 8 bits", "hardly any quality; some time"),
    Rung({"quantization": "NF4"}, "base in 4 bits", "little quality; some time"),
    Rung({"draws": False}, "no images drawn while training", "look at them afterwards"),
    Rung({"offload_blocks": True}, "blocks wait in host memory", "copying the base twice in each step", on_gpu=True),
)
"""What is tried, cheapest first. Each rung adds to those before, so that memory falls from rung to rung."""


class Fit(NamedTuple):
    """Settings that fit, with their plan and the rung."""

    settings: Settings
    plan: MemoryPlan
    rung: Rung


def fit_memory(
    settings: Settings,
    plan: Callable[[Settings], MemoryPlan],
    memory: int,
    on_gpu: bool,
    start: int,
    say: Callable[[str], object],
) -> Fit:
    """The settings of the first rung of :data:`LADDER` that fits.

    Memory falls from rung to rung, so it looks for the first that fits by halves, which takes at most four plans.

    Args:
        settings: Settings of the first rung.
        plan: Makes the plan of settings.
        memory: Memory of the device in bytes.
        on_gpu: Whether the device is a GPU.
        start: Rung to plan first.
        say: Gets a line for each plan.

    Raises:
        UserError: If not even the last rung fits.
    """
    rungs = _rungs(settings, on_gpu)
    known: dict[int, MemoryPlan] = {}

    def fits(number: int) -> bool:
        if number not in known:
            known[number] = plan(rungs[number][1])
            word = "fits" if known[number].fits(memory) else "does not fit"
            say(f"planned  {rungs[number][0].what}: {format_bytes(known[number].needed)}, {word}")
        return known[number].fits(memory)

    found = first_true(fits, len(rungs), start=start)
    if found is None:
        last = known[len(rungs) - 1]
        raise UserError(
            f"nothing fits into {format_bytes(memory)}: the run needs {format_bytes(last.needed)} even with "
            f"{'; '.join(rung.what for rung, _ in rungs[1:])}. Take a smaller base or a lower --data.init_args.resolution"
        )
    rung, chosen = rungs[found]
    return Fit(chosen, known[found], rung)


def first_true(holds: Callable[[int], bool], count: int, start: int) -> int | None:
    """The first of ``count`` numbers for which a condition holds that holds for all after it; None if it holds for none.

    Args:
        holds: The condition.
        count: Number of numbers, from 0.
        start: Number that is tried first.
    """
    low, high, middle = 0, count, min(start, count - 1)
    while low < high:
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
        middle = (low + high) // 2
    return low if low < count else None


def free_memory(device: Device) -> int:
    """Memory in bytes that is free on a device of this machine, or that a device of another machine has."""
    if device.is_cuda and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return device.memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _rungs(settings: Settings, on_gpu: bool) -> Sequence[tuple[Rung, Settings]]:
    """The rungs that change something, each with its settings."""
    rungs = [(LADDER[0], settings)]
    for rung in LADDER[1:]:
        changed = rungs[-1][1].changed(rung.changes)
        if changed != rungs[-1][1] and (on_gpu or not rung.on_gpu):
            rungs.append((rung, changed))
    return rungs


def first_guess(memory: int, is_small: bool) -> int:
    """Number of the rung to plan first: small bases and large cards need little, small cards much.

    Args:
        memory: Memory of the device in bytes.
        is_small: Whether the base is small.
    """
    return 0 if is_small or memory >= 40e9 else 1 if memory >= 20e9 else 3
