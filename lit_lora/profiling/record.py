"""Records the peak of each phase of a run, divided into kinds of memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_lora.profiling.kinds import KINDS
from lit_lora.profiling.meter import Reading

BETWEEN = "between"
"""Name of the phase between the others: loading data, saving, and steps that are not measured."""

MIB = 2**20

_ORDER = ("load", "forward", "backward", "optimizer", "validation", "test", "predict")

_SHORT = ("frozen", "adapt.", "grads", "optim.", "activ.", "other")
"""What the table calls the kinds, in at most six letters."""

_COLUMNS, _LONGEST = 80, 10
"""Width of the table, and of the name of a phase in it."""

_WITHOUT_ACTIVATIONS = ("load", "optimizer")


@dataclass
class PhaseMemory:
    """Memory of one phase.

    Args:
        peak: Highest number of bytes in use, by measure.
        end: Bytes in use at the last end of the phase, by measure.
        kinds: Bytes at the peak by kind: see :data:`~lit_lora.profiling.kinds.KINDS`.
        step: Optimizer step of the peak.
        count: Number of times that the phase was measured; defaults to 1.
    """

    peak: Reading
    end: Reading
    kinds: dict[str, int]
    step: int
    count: int = 1

    @property
    def height(self) -> int:
        """The peak in bytes of the first measure, which kinds divide."""
        return next(iter(self.peak.values()))

    def with_next(self, later: PhaseMemory) -> PhaseMemory:
        """Combine the measurement with a later one of the same phase."""
        higher = later if later.height > self.height else self
        peak = {name: max(value, later.peak[name]) for name, value in self.peak.items()}
        return PhaseMemory(peak, later.end, higher.kinds, higher.step, self.count + later.count)


class MemoryRecord:
    """The highest peak of each phase."""

    def __init__(self) -> None:
        self.phases: dict[str, PhaseMemory] = {}

    def add(self, name: str, memory: PhaseMemory) -> None:
        """Add one measurement of the phase ``name``."""
        before = self.phases.get(name)
        self.phases[name] = before.with_next(memory) if before else memory
        if before is None:
            self.phases = {name: self.phases[name] for name in sorted(self.phases, key=_place)}

    @property
    def highest(self) -> tuple[str, PhaseMemory] | None:
        """Name and memory of the phase with the highest peak; None if nothing was measured."""
        return max(self.phases.items(), key=lambda item: item[1].height, default=None)

    def scalars(self) -> dict[str, float]:
        """Scalars for loggers, in MiB: peaks by phase, and kinds at the highest peak."""
        if self.highest is None:
            return {}
        values = {
            f"memory_mib/{'peak' if i == 0 else unit}/{name}": size / MIB
            for name, memory in self.phases.items()
            for i, (unit, size) in enumerate(memory.peak.items())
        }
        kinds = self.highest[1].kinds
        return values | {f"memory_mib/kind/{kind.replace(' ', '_')}": size / MIB for kind, size in kinds.items()}

    def table(self) -> str:
        """A table with one row per phase, in MiB, of at most 80 columns."""
        units = list(self.highest[1].peak) if self.highest else []
        peaks = ["peak"] if len(units) == 1 else [unit[:6] for unit in units]
        head = ["phase", *peaks, "at end", *_SHORT, "times"]
        rows = [head]
        for name, memory in self.phases.items():
            sizes = [*memory.peak.values(), next(iter(memory.end.values())), *(memory.kinds[kind] for kind in KINDS)]
            rows.append([_cut(name), *map(_mib, sizes), str(memory.count)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        between = "  " if sum(widths) + 2 * (len(widths) - 1) <= _COLUMNS else " "
        return "\n".join(
            between.join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        )


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _mib(size: int) -> str:
    """A number of MiB in at most six characters."""
    mib = size / MIB
    return f"{mib:,.1f}" if mib < 999.95 else f"{mib:,.0f}" if mib < 99_999.5 else f"{mib:.0f}"


def _place(name: str) -> tuple[int, str]:
    """Sort key of a phase: first in the order of a run, then phases named with :func:`phase`, then ``between``."""
    known = name in _ORDER
    return (_ORDER.index(name) if known else len(_ORDER) + (name == BETWEEN), "" if known else name)


def divide(name: str, peak: int, counted: Mapping[str, int], other: int) -> dict[str, int]:
    """Divide the peak of a phase into kinds of memory.

    Args:
        name: Name of the phase.
        peak: Peak in bytes.
        counted: Bytes of the kinds that can be counted, at the end of the phase.
        other: Bytes in use outside a step that belong to none of these kinds.

    Returns:
        Bytes by kind: see :data:`~lit_lora.profiling.kinds.KINDS`. Bytes beyond ``counted`` and ``other`` are activations, except
        in phases in which the model computes nothing.
    """
    above = max(0, peak - sum(counted.values()))
    other = min(max(0, other), above)
    activations = 0 if name in _WITHOUT_ACTIVATIONS else above - other
    return {**counted, "activations": activations, "other": above - activations}
