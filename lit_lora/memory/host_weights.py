"""Frozen tensors in host memory, with copies on a device while they are in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.memory.page_locked import page_locked

TRAINING_ADVICE = (
    "set memory.offload_folder, turn off memory.offload_encoders and memory.offload_blocks, or store the base in fewer bits with "
    "model.quantization"
)
"""What a run of training can do without so much page-locked memory."""


class HostWeights:
    """Frozen tensors that stay in host memory and have copies on a device while they are in use.

    The ``data`` of a tensor is its copy on the device while there is one, otherwise its value in host memory. Nothing is copied
    back, because the tensors do not change.

    Copies can be made on a separate stream. Their memory is allocated on the computing stream, so it is reused in the order of
    that stream, and copies wait no longer than necessary.

    Args:
        tensors: Parameters and buffers in host memory.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._host = [tensor.data for tensor in self._tensors]
        self._copies: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._computing: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, and of their copies on the device."""
        return sum(tensor.nbytes for tensor in self._host)

    @property
    def is_on_device(self) -> bool:
        """Whether copies on the device exist or are being made."""
        return bool(self._copies)

    def pin(self, advice: str = TRAINING_ADVICE) -> None:
        """Move the tensors to page-locked memory, from which copies to a GPU are asynchronous.

        Args:
            advice: What the user can do if the system cannot lock that much. Defaults to options of training.

        Raises:
            UserError: If the system cannot lock that much memory.
        """
        assert not self._copies, "tensors were pinned while copies are on the device"
        waiting = [index for index, value in enumerate(self._host) if not value.is_pinned()]
        try:
            with torch.inference_mode(False), torch.no_grad():
                for number, copy in page_locked([self._host[index] for index in waiting]):
                    index = waiting[number]
                    self._host[index] = self._tensors[index].data = copy
        except RuntimeError as error:
            raise UserError(
                f"no more host memory can be page-locked for offloaded weights ({str(error).splitlines()[0]}); {advice}"
            ) from error

    def fetch(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to copy the tensors to the device; this has no effect if the copies exist already.

        Args:
            device: Device to copy to.
            stream: Stream that copies, so that :meth:`wait` must be called before use; defaults to the current stream.
        """
        if self._copies:
            return
        # Copies made in inference mode, in which Lightning validates, could not be used for training.
        with torch.inference_mode(False), torch.no_grad():
            copies = [torch.empty_like(tensor, device=device) for tensor in self._host]
            if stream is not None:
                self._computing = torch.cuda.current_stream(device)
                # Pending kernels of the computing stream may still read the former contents of this memory.
                stream.wait_stream(self._computing)
            self._copy(copies, stream)
            self._show(copies)
        self._copies = copies

    def wait(self) -> None:
        """Make the current stream wait until the copies are complete; the host does not wait."""
        if self._copied is None:
            return
        current = torch.cuda.current_stream(self._copies[0].device)
        current.wait_event(self._copied)
        if current != self._computing:
            for copy in self._copies:
                copy.record_stream(current)

    def drop(self) -> None:
        """Free the copies."""
        if not self._copies:
            return
        if self._copied is not None:
            assert self._computing is not None
            # The memory returns to the computing stream, which has not waited for copies that it did not use.
            self._computing.wait_event(self._copied)
        with torch.inference_mode(False), torch.no_grad():
            self._show(self._host)
        self._copies, self._copied, self._computing = [], None, None

    def _copy(self, copies: list[Tensor], stream: torch.cuda.Stream | None) -> None:
        """Begin to copy the tensors, on a stream or on the current one."""
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for copy, tensor in zip(copies, self._host, strict=True):
                copy.copy_(tensor, non_blocking=True)
            if stream is not None:
                self._copied = stream.record_event()

    def _show(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.data = value


def target_of(convert: Callable[[Tensor], Tensor], device: torch.device) -> torch.device:
    """The device to which a function given to ``nn.Module._apply`` moves tensors that are on ``device``."""
    with torch.inference_mode(False), torch.no_grad():
        return convert(torch.empty(0, device=device)).device


def check_offload(key: str, device: torch.device, strategy: object | None = None) -> None:
    """Check that offloading to host memory can save memory in this run.

    Args:
        key: Config key to name in the error.
        device: Device that computes.
        strategy: Strategy that shards and moves state by itself; defaults to None, for any other strategy.

    Raises:
        UserError: If the device is not a CUDA GPU, or the strategy moves state by itself.
    """
    if device.type == "cpu":
        raise UserError(
            f"{key} moves memory from a GPU to the host, and this run computes on the host itself; set {key} to false, or "
            f"save memory with memory.gradient_checkpointing and model.quantization"
        )
    if device.type != "cuda":
        raise UserError(f"{key} supports CUDA devices only, not {device.type!r}; set {key} to false")
    if strategy is not None:
        raise UserError(
            f"{key} cannot be combined with {type(strategy).__name__}; set {key} to false and the strategy's own cpu_offload, "
            f"offload_optimizer or offload_parameters to true, or use strategy ddp"
        )
