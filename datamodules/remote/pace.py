"""The least rate at which a transfer must go on."""

from __future__ import annotations

from lit_lora.datamodules.remote.remote_source import TransientError

MIN_RATE = 16 << 10
"""Least number of bytes a second, so that a server that sends a byte now and then cannot hold up a run for ever."""


class Pace:
    """Measures the rate of a transfer in windows.

    Args:
        window: Length of a window in seconds.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._bytes = 0
        self._seconds = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """Count what was read, and the time for which the reader waited.

        Raises:
            TransientError: If a window is over, and fewer than ``MIN_RATE`` bytes a second were read in it.
        """
        self._bytes += num_bytes
        self._seconds += seconds
        if self._seconds < self._window:
            return
        if self._bytes < MIN_RATE * self._seconds:
            raise TransientError(
                f"it sent {self._bytes} bytes in {self._seconds:.0f} s, and at least {MIN_RATE} a second are needed"
            )
        self._bytes, self._seconds = 0, 0.0
