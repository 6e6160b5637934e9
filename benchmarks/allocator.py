"""How many bytes PyTorch's CPU allocator has handed out at most while something runs."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from torch.autograd.profiler import profile


class AllocatorPeak:
    """Watches PyTorch's CPU allocator inside a block; afterwards :attr:`bytes` is the most that was held at any moment.

    Every allocation counts that is made in this thread, where the CPU's backward pass runs too, also those inside a
    kernel (oneDNN's reordered weights, attention's buffers). Memory that was there before counts neither at the start
    nor when it is freed. A file that is mapped counts as a whole, so let a model be loaded before. The resident memory
    of the process is larger: libraries, the C heap's own needs, buffers of the BLAS.

    What is recorded, about a kilobyte for each operation and allocation, lies outside the allocator.
    """

    bytes = 0

    def __enter__(self) -> Self:
        self._profiler = profile(use_kineto=True, profile_memory=True)
        self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._profiler.__exit__(kind, error, traceback)
        assert self._profiler.kineto_results is not None
        events = self._profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        held = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            held += change
            self.bytes = max(self.bytes, held)


def peak_allocated(function: Callable[[], object]) -> int:
    """Call ``function`` and return the most bytes that it held at any moment: see :class:`AllocatorPeak`."""
    with AllocatorPeak() as peak:
        function()
    return peak.bytes
