"""Callbacks, for :class:`lit_lora.LoraDiffusion` and, where they say so, for any LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_lora.lazy import lazy_names

if TYPE_CHECKING:
    from lit_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
    from lit_lora.callbacks.adapter_ema import AdapterEMA
    from lit_lora.callbacks.image_writer import ImageWriter
    from lit_lora.callbacks.memory_profiler import MemoryProfiler
    from lit_lora.callbacks.preemption import Preemption
    from lit_lora.callbacks.run_report import RunReport
    from lit_lora.callbacks.sample_images import SampleImages

__all__ = [
    "AdapterCheckpoint",
    "AdapterEMA",
    "ImageWriter",
    "MemoryProfiler",
    "Preemption",
    "RunReport",
    "SampleImages",
]

_MODULES = {
    "AdapterCheckpoint": "lit_lora.callbacks.adapter_checkpoint",
    "AdapterEMA": "lit_lora.callbacks.adapter_ema",
    "ImageWriter": "lit_lora.callbacks.image_writer",
    "MemoryProfiler": "lit_lora.callbacks.memory_profiler",
    "Preemption": "lit_lora.callbacks.preemption",
    "RunReport": "lit_lora.callbacks.run_report",
    "SampleImages": "lit_lora.callbacks.sample_images",
}

__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
