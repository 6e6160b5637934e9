"""Frozen tensors that are mapped from files, read by a thread while the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lit_lora.mapped import read_ahead
from lit_lora.memory.host_weights import HostWeights
from lit_lora.memory.page_locked import aligned_bytes


class FileReader:
    """Copies tensors that are mapped from files to a device, in a thread of its own.

    Copies to a GPU go through two page-locked buffers in turn: while the GPU takes one block from a buffer, the thread reads
    the next one into the other.

    Args:
        device: Device to copy to.
        stream: Stream of a GPU that copies; None for the CPU.
        size: Bytes of the largest sum of tensors that are copied together.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None, size: int) -> None:
        self._stream = stream
        self._buffers: list[Tensor] = []
        if stream is not None:
            self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._taken: list[torch.cuda.Event | None] = [None, None]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"lit-lora-blocks-{device}")

    def read(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Future[torch.cuda.Event | None]:
        """Begin to copy tensors.

        Args:
            sources: Tensors in host memory.
            targets: Tensors of the same shapes on the device, which must not be used before the result is there.

        Returns:
            The event after which the copies are complete, or None if they are complete at once.
        """
        return self._thread.submit(self._copy, sources, targets)

    def _copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> torch.cuda.Event | None:
        read_ahead(*sources)
        if self._stream is None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)
            return None
        (buffer, taken), start = (self._buffers[0], self._taken[0]), 0
        if taken is not None:
            taken.synchronize()
        for source, target in zip(sources, targets, strict=True):
            staged = buffer[start : start + source.nbytes].view(source.dtype).view(source.shape)
            staged.copy_(source)
            with torch.cuda.stream(self._stream):
                target.copy_(staged, non_blocking=True)
            start += aligned_bytes(source)
        copied = self._stream.record_event()
        self._buffers.reverse()
        self._taken = [self._taken[1], copied]
        return copied


class MappedWeights(HostWeights):
    """Frozen tensors that are mapped from files and have copies on a device while they are in use.

    Args:
        tensors: Parameters and buffers in host memory, some or all of which are mapped from files.
    """

    reader: FileReader
    """Copies the tensors; set before the first use."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        self._reading: Future[torch.cuda.Event | None] | None = None

    @property
    def staged_bytes(self) -> int:
        """Bytes that the tensors take in a buffer of :class:`FileReader`."""
        return sum(aligned_bytes(tensor) for tensor in self._host)

    def pin(self, advice: str = "") -> None:
        """Leave the tensors where they are: they are copied through page-locked buffers."""

    def wait(self) -> None:
        self._finish_reading()
        super().wait()

    def drop(self) -> None:
        self._finish_reading()
        super().drop()

    def _copy(self, copies: list[Tensor], stream: torch.cuda.Stream | None) -> None:
        self._reading = self.reader.read(self._host, copies)

    def _finish_reading(self) -> None:
        if self._reading is not None:
            self._copied, self._reading = self._reading.result(), None
