"""How many bytes PyTorch's CPU allocator has handed out at most while something runs."""

from __future__ import annotations

from collections.abc import Callable

from torch.autograd.profiler import profile


def peak_allocated(function: Callable[[], object]) -> int:
    """Call ``function`` and return the most bytes that it held at any moment, above what was held at its start.

    Every allocation counts that is made in this thread, where the CPU's backward pass runs too, also those inside a
    kernel (oneDNN's reordered weights, attention's buffers). Memory that was there before counts neither at the start
    nor when it is freed, so let the function build what it is to be measured with. The resident memory of the process
    is larger: libraries, the C heap's own needs, buffers of the BLAS.

    What is recorded, about a kilobyte for each operation and allocation, lies outside the allocator.

    Args:
        function: What to measure; it takes nothing, and what it returns is let go.
    """
    with profile(use_kineto=True, profile_memory=True) as profiler:
        function()
    assert profiler.kineto_results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak
