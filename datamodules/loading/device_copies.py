"""Copies of batches on a GPU, made while the steps before them compute."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lit_lora.datamodules.loading.dataset import Batch
from lit_lora.datamodules.loading.threads import SharedWork

_COPIED = "copied"


class DeviceCopies:
    """Copies batches to a GPU in a stream of its own.

    Loader threads begin the copies as soon as they have built a batch; the stream that computes waits for a copy before it
    uses the batch. On other devices batches are left where they are.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, batch: Batch) -> Batch:
        """Begin to copy a batch; any thread may call this.

        Returns:
            The batch on the device, which only :meth:`finish` makes safe to use.
        """
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            # Batches are built in pinned memory, whose allocator waits for this stream before it gives that to others.
            copy: Batch = move_data_to_device(batch, self.device)
            copy[_COPIED] = self._stream.record_event()
        return copy

    def finish(self, batch: Batch) -> Batch:
        """Let the current stream wait for the copy of a batch from :meth:`begin`."""
        copied = batch.pop(_COPIED, None)
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for value in tree_leaves(batch):
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(current)  # so that the copies' stream does not reuse its memory too early
        return batch


class CopiedWork:
    """Work on a batch at whose end its copy to the device begins.

    Args:
        work: Work on the batch.
        copies: Copies on the device.
    """

    def __init__(self, work: SharedWork[Batch], copies: DeviceCopies) -> None:
        self._work = work
        self._copies = copies

    def __len__(self) -> int:
        return len(self._work)

    def do(self, part: int) -> None:
        """Do one part."""
        self._work.do(part)

    def finish(self) -> Batch:
        """The batch on the device, see :meth:`DeviceCopies.begin`."""
        return self._copies.begin(self._work.finish())
