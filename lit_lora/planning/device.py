"""Memory and speed of devices, for the estimates of a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from lit_lora.errors import UserError

COMPUTE_UTILISATION = 0.4
"""Assumed share of the peak rate that matrix products and convolutions reach in a training step; plans print it."""
BANDWIDTH_UTILISATION = 0.7
"""Assumed share of the memory bandwidth that other operations reach."""

CUDA_CONTEXT = 500 * 10**6
"""Bytes of the CUDA context and kernels of a process; 300 to 600 MB depending on card and driver."""
WORKSPACES = 130 * 10**6
"""Bytes of the workspaces of cuBLAS (8 to 32 MiB per handle) and cuDNN; 84 and 101 MB were measured on an H100."""
FRAGMENTATION = 0.03
"""Share of the peak that the caching allocator reserves but cannot use."""
PROCESS = 900 * 10**6
"""Bytes of host memory for Python and its libraries."""


@dataclass(frozen=True)
class Device:
    """A device that trains.

    Args:
        name: Name of the device, or ``cpu``.
        memory: Memory in bytes; None if it is not known.
        half_flops: Dense bfloat16 operations per second with float32 accumulation; float16 on devices without bfloat16.
        float_flops: float32 operations per second.
        bandwidth: Memory bandwidth in bytes per second.
    """

    name: str
    memory: int | None
    half_flops: float
    float_flops: float
    bandwidth: float

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.name != "cpu"

    def beside(self, peak: int) -> dict[str, int]:
        """Bytes that a run needs beside its tensors, by purpose: allowances, not measurements."""
        if not self.is_cuda:
            return {"Python and libraries": PROCESS}
        return {
            "CUDA context": CUDA_CONTEXT,
            "cuBLAS and cuDNN workspaces": WORKSPACES,
            "fragmentation": int(peak * FRAGMENTATION),
        }

    def seconds(self, work: Sequence[tuple[int, int, int]]) -> float:
        """Estimated seconds of operations: each takes the time of its arithmetic or of its memory traffic, whichever is longer.

        Args:
            work: Operations, as in :attr:`~lit_lora.planning.storage_meter.StorageMeter.work`.
        """
        bandwidth = self.bandwidth * BANDWIDTH_UTILISATION
        rates = {True: self.half_flops * COMPUTE_UTILISATION, False: self.float_flops * COMPUTE_UTILISATION}
        return sum(max(flops / rates[size < 4], moved / bandwidth) for flops, moved, size in work)


def _gpu(name: str, gigabytes: int, half: float, single: float, bandwidth: float) -> Device:
    return Device(name, gigabytes * 10**9, half * 1e12, single * 1e12, bandwidth * 1e9)


_SMALLEST_MATRIX, _LARGEST_MATRIX = 192, 1536
_MEASURABLE = 0.01
"""Seconds."""

# From the vendors' data sheets: GB, TFLOP/s of bfloat16 with float32 accumulation, TFLOP/s of float32, GB/s.
_GPUS = (
    _gpu("T4", 16, 65, 8.1, 320),
    _gpu("V100", 16, 125, 15.7, 900),
    _gpu("RTX 3060", 12, 25.5, 12.7, 360),
    _gpu("RTX 3080", 10, 59.5, 29.8, 760),
    _gpu("RTX 3090", 24, 71, 35.6, 936),
    _gpu("RTX 4070", 12, 58.3, 29.1, 504),
    _gpu("RTX 4090", 24, 165, 82.6, 1008),
    _gpu("RTX 5090", 32, 209, 104.8, 1792),
    _gpu("A10G", 24, 70, 31.5, 600),
    _gpu("L4", 24, 121, 30.3, 300),
    _gpu("L40S", 48, 362, 91.6, 864),
    _gpu("A100", 80, 312, 19.5, 2039),
    _gpu("H100", 80, 989, 66.9, 3350),
    _gpu("H200", 141, 989, 66.9, 4800),
)


def find_device(name: str) -> Device:
    """The device of this name; case, spaces and punctuation do not matter, and ``cpu`` is the CPU of this machine.

    Args:
        name: ``cpu`` or the name of a GPU, such as ``RTX 3060``.

    Raises:
        UserError: If no device has this name.
    """
    if name == "cpu":
        return _this_cpu()
    known = {_plain(device.name): device for device in _GPUS}
    if _plain(name) not in known:
        raise UserError(
            f"device={name!r} is not known; choose cpu, {', '.join(device.name for device in _GPUS)}, or the most similar "
            f"one, together with device_memory"
        )
    return known[_plain(name)]


def default_device(accelerator: str) -> Device:
    """The device that a trainer with this ``accelerator`` would use on this machine; an A100 if a GPU is asked for and absent."""
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return _this_cpu()
    if not torch.cuda.is_available():
        return find_device("A100")
    return _this_gpu()


def chosen_device(name: str | None, accelerator: str) -> Device:
    """The device of this name; without a name, the :func:`default_device` of a trainer with this ``accelerator``."""
    return default_device(accelerator) if name is None else find_device(name)


def device_of(root_device: torch.device) -> Device:
    """The device of a trainer with this root device."""
    return _this_gpu(root_device) if root_device.type == "cuda" else _this_cpu()


def is_here(device: Device) -> bool:
    """Whether a device is this machine's: its CPU, or a GPU of the kind that it has."""
    if not device.is_cuda:
        return True
    if not torch.cuda.is_available():
        return False
    name = torch.cuda.get_device_name()
    return device.name == name or device == _known(name)


def _known(name: str) -> Device | None:
    """The known GPU that a driver's name, such as ``NVIDIA H100 80GB HBM3``, is of; None if there is none."""
    alike = [device for device in _GPUS if _plain(device.name) in _plain(name)]
    return max(alike, key=lambda device: len(device.name), default=None)


def _this_gpu(device: torch.device | int = 0) -> Device:
    properties = torch.cuda.get_device_properties(device)
    like = _known(properties.name) or find_device("A100")
    return Device(properties.name, int(properties.total_memory), like.half_flops, like.float_flops, like.bandwidth)


@cache
def _this_cpu() -> Device:
    """The CPU of this machine, with rates from short measurements."""
    single, half = (_flops(dtype) / COMPUTE_UTILISATION for dtype in (torch.float32, torch.bfloat16))
    values = torch.ones(1 << 22)
    bandwidth = 2 * values.nbytes / _shortest(values.clone) / BANDWIDTH_UTILISATION
    return Device("cpu", None, half, single, bandwidth)


def _flops(dtype: torch.dtype) -> float:
    """Operations per second of multiplying matrices, of the first size that takes long enough to be measured.

    Processors without instructions for bfloat16 take seconds for sizes that keep many cores busy for a few milliseconds.
    """
    size = _SMALLEST_MATRIX
    while True:
        matrix = torch.ones(size, size, dtype=dtype)
        seconds = _shortest(lambda m=matrix: m @ m)  # type: ignore[misc]
        if seconds >= _MEASURABLE or size >= _LARGEST_MATRIX:
            return 2 * size**3 / seconds
        size *= 2


def _shortest(function: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
