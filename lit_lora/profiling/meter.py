"""Meters of memory in use and of its peak."""

from __future__ import annotations

import ctypes
import platform
import resource
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path

import torch

from lit_lora.files import atomic_file

Reading = dict[str, int]
"""Bytes by measure, such as ``allocated``; kinds of memory divide the first measure."""

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter(ABC):
    """Reads the memory in use on one device.

    Attributes:
        note: Sentence on what the figures leave out; None if they are complete.
        keeps_freed: Whether freed memory may still be counted, because the process has not returned it.
    """

    note: str | None = None
    keeps_freed = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    @abstractmethod
    def device_name(self) -> str:
        """Name of the hardware."""

    @abstractmethod
    def current(self) -> Reading:
        """Bytes in use now, by measure."""

    @abstractmethod
    def peak(self) -> Reading:
        """Highest number of bytes in use since the last :meth:`reset`, by measure."""

    @abstractmethod
    def reset(self) -> None:
        """Reset the peak to the current use."""

    def diagnose(self, folder: Path, prefix: str) -> list[Path]:
        """Write diagnostics of the allocator, if it has any.

        Args:
            folder: Folder of the files.
            prefix: Start of the files' names.

        Returns:
            The written files.
        """
        return []


class CudaMeter(MemoryMeter):
    """Reads PyTorch's allocator on a CUDA device: ``allocated`` to tensors, ``reserved`` from the driver.

    Resetting also affects what ``torch.cuda.max_memory_allocated`` returns to others.
    """

    _recording = False

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def current(self) -> Reading:
        return {
            "allocated": torch.cuda.memory_allocated(self.device),
            "reserved": torch.cuda.memory_reserved(self.device),
        }

    def peak(self) -> Reading:
        return {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "reserved": torch.cuda.max_memory_reserved(self.device),
        }

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def record_history(self, entries: int) -> None:
        """Record the last ``entries`` events of the allocator; 0 stops recording."""
        self._recording = entries > 0
        torch.cuda.memory._record_memory_history("all" if entries else None, max_entries=entries)

    def diagnose(self, folder: Path, prefix: str) -> list[Path]:
        files = [folder / f"{prefix}_summary.txt"]
        with atomic_file(files[0]) as part:
            part.write_text(torch.cuda.memory_summary(self.device))
        if self._recording:
            files.append(folder / f"{prefix}_snapshot.pickle")
            with atomic_file(files[1]) as part:
                torch.cuda.memory._dump_snapshot(str(part))
        return files


class ProcessMeter(MemoryMeter):
    """Reads the ``resident`` memory of this process.

    At each reset the C library returns freed memory to the system if it can; otherwise the figures would include memory of
    earlier phases. Linux keeps the peak and resets it on demand. If a process may not reset it, a phase's peak is exact only if
    it is the highest of the process until then; otherwise it is the larger of the readings at both ends of the phase, and
    ``note`` says so.

    Args:
        device: The CPU.
        resettable: Whether the system lets this process reset its peak; defaults to the result of a trial.
    """

    def __init__(self, device: torch.device, resettable: bool | None = None) -> None:
        super().__init__(device)
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self.keeps_freed = self._trim is None
        self._resettable = _forget_peak() if resettable is None else resettable
        if not self._resettable:
            self.note = (
                "the system does not let this process reset its peak, so a phase's peak is exact only if it is the "
                "highest of the process until then"
            )
        self.reset()

    @property
    def device_name(self) -> str:
        with suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        return platform.processor() or platform.machine()

    def current(self) -> Reading:
        return {"resident": _resident()}

    def peak(self) -> Reading:
        now, highest = _resident(), _highest()
        if self._resettable or highest > self._highest_before:
            return {"resident": max(highest, now)}
        return {"resident": max(self._at_reset, now)}

    def reset(self) -> None:
        if self._trim is not None:
            self._trim(0)
        if self._resettable:
            _forget_peak()
        self._at_reset = _resident()
        self._highest_before = _highest()


def meter_of(device: torch.device) -> MemoryMeter:
    """The meter of a device: of the allocator on CUDA, of the process on all other devices."""
    return CudaMeter(device) if device.type == "cuda" else ProcessMeter(device)


def _resident() -> int:
    """Resident bytes of this process."""
    size = _from_status("VmRSS:")
    if size is None:
        import psutil  # type: ignore[import-untyped]

        size = int(psutil.Process().memory_info().rss)
    return size


def _highest() -> int:
    """Highest number of resident bytes of this process since its start or the last reset."""
    size = _from_status("VmHWM:")
    if size is None:
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return size


def _from_status(field: str) -> int | None:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def _forget_peak() -> bool:
    """Ask Linux to reset the peak of this process' resident memory; returns whether it did."""
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")
        return True
    return False
