"""The peaks of a run's phases, and what they consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_lora.profiling.kinds import KINDS
from lit_lora.profiling.meter import Reading

BETWEEN = "between"
"""All that is in no phase: loading data, saving, and the steps that are not measured."""

MIB = 2**20

_ORDER = ("load", "forward", "backward", "optimizer", "validation", "test", "predict")

_WITHOUT_ACTIVATIONS = ("load", "optimizer")


@dataclass
class PhaseMemory:
    """Memory of one phase.

    Args:
        peak: The most bytes in use, by the way of counting.
        end: Bytes in use at the end of the phase, the last time.
        kinds: What the peak consists of, bytes of each of :data:`~lit_lora.profiling.kinds.KINDS`.
        step: The optimizer step at which it was.
        count: How often the phase was measured.
    """

    peak: Reading
    end: Reading
    kinds: dict[str, int]
    step: int
    count: int = 1

    @property
    def height(self) -> int:
        """The peak in bytes as kinds share it."""
        return next(iter(self.peak.values()))

    def with_next(self, later: PhaseMemory) -> PhaseMemory:
        """Both together: the same phase measured again."""
        higher = later if later.height > self.height else self
        peak = {name: max(value, later.peak[name]) for name, value in self.peak.items()}
        return PhaseMemory(peak, later.end, higher.kinds, higher.step, self.count + later.count)


class MemoryRecord:
    """The highest peak of each phase."""

    def __init__(self) -> None:
        self.phases: dict[str, PhaseMemory] = {}

    def add(self, name: str, memory: PhaseMemory) -> None:
        """Note one measurement of the phase ``name``."""
        before = self.phases.get(name)
        self.phases[name] = before.with_next(memory) if before else memory
        if before is None:
            self.phases = {name: self.phases[name] for name in sorted(self.phases, key=_place)}

    @property
    def highest(self) -> tuple[str, PhaseMemory] | None:
        """Name and memory of the phase with the highest peak; None where nothing was measured."""
        return max(self.phases.items(), key=lambda item: item[1].height, default=None)

    def scalars(self) -> dict[str, float]:
        """Peaks by phase and, of the highest one, bytes by kind, in MiB, named for loggers."""
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
        """Phases down, figures across, in MiB."""
        units = list(self.highest[1].peak) if self.highest else []
        head = ["phase", *(f"peak {unit}" for unit in units), "at end", *KINDS, "measured"]
        rows = [head]
        for name, memory in self.phases.items():
            sizes = [*memory.peak.values(), next(iter(memory.end.values())), *(memory.kinds[kind] for kind in KINDS)]
            rows.append([name, *(f"{size / MIB:,.1f}" for size in sizes), str(memory.count)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        )


def _place(name: str) -> tuple[int, str]:
    """Where a phase stands in tables: as a run goes, then the code's own by name, what is between at the end."""
    known = name in _ORDER
    return (_ORDER.index(name) if known else len(_ORDER) + (name == BETWEEN), "" if known else name)


def divide(name: str, peak: int, counted: Mapping[str, int], other: int) -> dict[str, int]:
    """What a phase's peak consists of.

    Args:
        name: The phase.
        peak: Bytes.
        counted: Bytes of the kinds that can be counted, at the end of the phase.
        other: Bytes in use beyond them when no step is under way.

    Returns:
        Bytes of each of :data:`~lit_lora.profiling.kinds.KINDS`; the part above what is counted and ``other`` is
        activations, except where nothing is computed by the model.
    """
    above = max(0, peak - sum(counted.values()))
    other = min(max(0, other), above)
    activations = 0 if name in _WITHOUT_ACTIVATIONS else above - other
    return {**counted, "activations": activations, "other": above - activations}
