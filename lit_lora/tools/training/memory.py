"""The cheapest settings of a run that fit into a memory, found by the planner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lit_lora.byte_sizes import format_bytes
from lit_lora.errors import UserError
from lit_lora.machine import available_memory
from lit_lora.planning.device import Device, is_here
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.tools.training.choices import Settings


class Rung(NamedTuple):
    """A step down the ladder of settings.

    Args:
        changes: Settings that change, in addition to those of all rungs before.
        name: Its name, in one or two words.
        price: What it costs.
        on_gpu: Whether it has an effect on GPUs alone.
    """

    changes: dict[str, Any]
    name: str
    price: str
    on_gpu: bool = False


LADDER = (
    Rung({"gradient_checkpointing": True}, "checkpointing", "a third more time"),
    Rung({"offload_encoders": True}, "encoders offloaded", "copying them in each step", on_gpu=True),
    Rung({"batch_size": 1}, "batch of 1", "the same gradients in more time"),
    Rung({"quantization": "Int8"}, "Int8 base", "hardly any quality; some time"),
    Rung({"quantization": "NF4"}, "NF4 base", "little quality; some time"),
    Rung({"offload_blocks": True}, "blocks offloaded", "copying the base twice in each step", on_gpu=True),
)
"""What is tried, cheapest first. Each rung adds to those before, so that memory falls from rung to rung."""


class Fit(NamedTuple):
    """Settings that fit, with their plan and the names of the rungs that they take."""

    settings: Settings
    plan: MemoryPlan
    names: str


def fit_memory(
    settings: Settings,
    plan: Callable[[Settings], MemoryPlan],
    memory: int,
    on_gpu: bool,
    start: int,
    say: Callable[[str], object],
) -> Fit:
    """The settings of the first rung of :data:`LADDER` that fits, and images drawn while training if these fit too.

    Memory falls from rung to rung, so it looks for the first that fits by halves. Training gives up nothing for the images.

    Args:
        settings: The settings to begin with.
        plan: Makes the plan of settings.
        memory: Memory of the device in bytes.
        on_gpu: Whether the device is a GPU.
        start: Number of rungs to take in the first plan.
        say: Gets a line for each plan.

    Raises:
        UserError: If not even the last rung fits.
    """
    rungs = _rungs(settings, on_gpu)
    known: dict[Settings, MemoryPlan] = {}

    def planned(tried: Settings) -> MemoryPlan:
        if tried not in known:
            known[tried] = plan(tried)
        return known[tried]

    def fits(number: int) -> bool:
        name, tried = rungs[number]
        training = _without_drawing(planned(tried))
        say(f"planned  {name}: {format_bytes(training.needed)}, {'fits' if training.fits(memory) else 'does not fit'}")
        return training.fits(memory)

    found = first_true(fits, len(rungs), start)
    if found is None:
        name, last = rungs[-1]
        raise UserError(
            f"nothing fits into {format_bytes(memory)}: the run needs {format_bytes(_without_drawing(known[last]).needed)} even "
            f"with {name}. Free some memory, or take a smaller base or a lower --data.init_args.resolution"
        )
    name, chosen = rungs[found]
    for tiled in (False, True) if settings.draws else ():
        drawing = planned(replace(chosen, vae_tiling=tiled))
        say(f"planned  with images drawn{' in tiles' if tiled else ''}: {format_bytes(drawing.needed)}")
        if drawing.fits(memory):
            return Fit(replace(chosen, vae_tiling=tiled), drawing, name)
    return Fit(replace(chosen, draws=False), _without_drawing(known[chosen]), name)


HOST_MARGIN = 1.2
"""Host memory that is free for weights that wait there, in multiples of them: page-locked memory is never swapped out."""


def in_files(fit: Fit, plan: Callable[[Settings], MemoryPlan], folder: str) -> Fit:
    """What fits, with the offloaded blocks in files instead of host memory.

    Args:
        fit: Settings that fit into the device's memory.
        plan: Makes the plan of settings.
        folder: Folder for the files.
    """
    settings = replace(fit.settings, offload_folder=folder)
    planned = plan(settings)
    return fit._replace(settings=settings, plan=planned if settings.draws else _without_drawing(planned))


def _without_drawing(planned: MemoryPlan) -> MemoryPlan:
    """The plan of the same run if it draws no images."""
    return replace(planned, phases={name: kinds for name, kinds in planned.phases.items() if name != "sampling"})


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
    if device.is_cuda and is_here(device):
        return int(torch.cuda.mem_get_info()[0])
    return device.memory or available_memory()


def _rungs(settings: Settings, on_gpu: bool) -> list[tuple[str, Settings]]:
    """The settings of each rung that changes something, with the names of all rungs up to it; the first takes none."""
    rungs = [("nothing given up", settings)]
    taken: list[str] = []
    for rung in LADDER:
        changed = rungs[-1][1].changed(rung.changes)
        if changed != rungs[-1][1] and (on_gpu or not rung.on_gpu):
            taken = [name for name in taken if not ("base" in rung.name and "base" in name)] + [rung.name]
            rungs.append((", ".join(taken), changed))
    return rungs


def first_guess(memory: int, is_small: bool) -> int:
    """Number of rungs to take in the first plan: small bases and large cards need few, small cards more.

    Args:
        memory: Memory of the device in bytes.
        is_small: Whether the base is small.
    """
    return 0 if is_small or memory >= 40e9 else 1 if memory >= 10e9 else 2
