"""Frozen tensors in host memory, with copies on a device while they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lit_lora.errors import UserError


class HostWeights:
    """Frozen tensors that stay in host memory and come to a device for a while.

    A tensor's ``data`` is its copy on the device while there is one, and the host's otherwise. Nothing is ever copied back,
    since nothing changes them.

    The copies are made on a stream of their own, if one is given, into memory that the computing stream's allocator gives:
    so that memory is used again in the computing stream's order, and copying waits for no more than it has to.

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
        """Bytes of all the tensors, which is what their copies take on the device."""
        return sum(tensor.nbytes for tensor in self._host)

    @property
    def is_on_device(self) -> bool:
        """Whether there are copies, or they are on the way."""
        return bool(self._copies)

    def pin(self) -> None:
        """Lock the pages in memory: only then does a copy to a GPU run beside other work.

        Raises:
            UserError: The system does not give so much.
        """
        assert not self._copies, "what is on the device is not to be moved"
        for index, tensor in enumerate(self._tensors):
            if self._host[index].is_pinned():
                continue
            try:
                self._host[index] = self._host[index].pin_memory()
            except RuntimeError as error:
                raise UserError(
                    f"no more host memory can be locked for weights that wait for the GPU ({str(error).splitlines()[0]}); "
                    f"turn offloading off, or store the base in fewer bits with model.quantization"
                ) from error
            tensor.data = self._host[index]

    def fetch(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to copy to the device; does nothing if the copies are there already.

        Args:
            device: Where to.
            stream: The stream to copy on; the current one if not given. :meth:`wait` must then be called before use.
        """
        if self._copies:
            return
        # In inference mode, as Lightning validates in, the copies could not be used for training later.
        with torch.inference_mode(False), torch.no_grad():
            copies = [torch.empty_like(tensor, device=device) for tensor in self._host]
            if stream is None:
                for copy, tensor in zip(copies, self._host, strict=True):
                    copy.copy_(tensor, non_blocking=True)
            else:
                self._computing = torch.cuda.current_stream(device)
                # Kernels that wait in the computing stream may still read what lay in this memory before.
                stream.wait_stream(self._computing)
                with torch.cuda.stream(stream):
                    for copy, tensor in zip(copies, self._host, strict=True):
                        copy.copy_(tensor, non_blocking=True)
                    self._copied = stream.record_event()
            self._show(copies)
        self._copies = copies

    def wait(self) -> None:
        """Have the current stream wait until the copies are complete; the host does not wait."""
        if self._copied is None:
            return
        current = torch.cuda.current_stream(self._copies[0].device)
        current.wait_event(self._copied)
        if current != self._computing:
            for copy in self._copies:
                copy.record_stream(current)

    def drop(self) -> None:
        """Let the copies go."""
        if not self._copies:
            return
        if self._copied is not None:
            assert self._computing is not None
            # The memory goes back to this stream, which may never have waited for what it did not use.
            self._computing.wait_event(self._copied)
        with torch.inference_mode(False), torch.no_grad():
            self._show(self._host)
        self._copies, self._copied, self._computing = [], None, None

    def _show(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.data = value


def target_of(convert: Callable[[Tensor], Tensor], device: torch.device) -> torch.device:
    """Where tensors on this device come to when ``nn.Module._apply`` treats them with this function."""
    with torch.inference_mode(False), torch.no_grad():
        return convert(torch.empty(0, device=device)).device


def check_offload(key: str, device: torch.device, strategy: object | None = None) -> None:
    """Make sure that there is a device whose memory is saved by keeping something in host memory.

    Args:
        key: The config key to name in the error.
        device: Where the run computes.
        strategy: One that shares something out over the processes, and moves it as it needs.

    Raises:
        UserError: The device is the host itself, or there is such a strategy.
    """
    if device.type == "cpu":
        raise UserError(
            f"{key} moves memory from a GPU to the host, and this run computes on the host itself; set {key} to false, or "
            f"save memory with memory.gradient_checkpointing and quantization"
        )
    if device.type != "cuda":
        raise UserError(f"{key} works with CUDA devices, not with {device.type!r}; set {key} to false")
    if strategy is not None:
        raise UserError(
            f"{key} does not go with {type(strategy).__name__}; set {key} to false and the strategy's own cpu_offload, "
            f"offload_optimizer or offload_parameters to true, or use strategy ddp"
        )
