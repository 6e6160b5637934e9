"""Peak of the bytes that PyTorch's CPU allocator has handed out."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from torch.autograd.profiler import profile


class AllocatorPeak:
    """Measures the peak of PyTorch's CPU allocator inside a ``with`` block.

    All allocations of this thread count, including the backward pass, which runs in it on the CPU, and buffers inside
    kernels (oneDNN's reordered weights, attention's buffers). Tensors from before the block do not count. A mapped file
    counts with its full size, so load models before the block. The resident memory of the process is larger: it includes
    libraries, overhead of the C heap, and BLAS buffers.

    The profiler's records take about a kilobyte for each operation and allocation, outside the allocator.
    """

    bytes = 0
    """Largest number of bytes that were allocated at any moment of the block, known after it."""

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
    """Call ``function`` and return the peak of the bytes that it allocated; see :class:`AllocatorPeak`."""
    with AllocatorPeak() as peak:
        function()
    return peak.bytes
