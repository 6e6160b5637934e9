"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def resident() -> int:
    """Bytes of resident memory now."""
    return _status("VmRSS")


def peak_resident() -> int:
    """Largest number of bytes of resident memory since the process started or :func:`reset_peak` was called."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Reset the peak of resident memory to its present size."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024
