"""Planned memory of a process by phase and kind."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PlannedMemory:
    """Planned memory of a process on one device.

    Args:
        device: Name of the device.
        batch_size: Samples in a batch of one process.
        phases: Bytes of each kind at the peak of each phase.
        beside: Allowances in bytes for memory that belongs to no tensor, such as the CUDA context, by name.
    """

    device: str
    batch_size: int
    phases: dict[str, dict[str, int]]
    beside: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes of tensors at the peak."""
        return max(sum(kinds.values()) for kinds in self.phases.values())

    @property
    def peak_phase(self) -> str:
        """Phase of the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    def at_peak(self, kind: str) -> int:
        """Bytes of a kind at the peak."""
        return self.phases[self.peak_phase][kind]

    @property
    def needed(self) -> int:
        """Bytes that the device must have: the peak plus the allowances."""
        return self.peak + sum(self.beside.values())

    def fits(self, device_memory: int) -> bool:
        """Whether the process fits into this many bytes."""
        return self.needed <= device_memory

    def as_json(self) -> dict[str, Any]:
        """The plan in plain types, with ``peak``, ``peak_phase`` and ``needed``."""
        sums = {"peak": self.peak, "peak_phase": self.peak_phase, "needed": self.needed}
        return asdict(self) | sums
