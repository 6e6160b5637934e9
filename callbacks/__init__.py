"""Callbacks, for :class:`lit_lora.LoraDiffusion` and, where they say so, for any LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
    from lit_lora.callbacks.adapter_ema import AdapterEMA
    from lit_lora.callbacks.data_progress import DataProgress
    from lit_lora.callbacks.image_writer import ImageWriter
    from lit_lora.callbacks.sample_images import SampleImages

__all__ = ["AdapterCheckpoint", "AdapterEMA", "DataProgress", "ImageWriter", "SampleImages"]

_MODULES = {
    "AdapterCheckpoint": "adapter_checkpoint",
    "AdapterEMA": "adapter_ema",
    "DataProgress": "data_progress",
    "ImageWriter": "image_writer",
    "SampleImages": "sample_images",
}


def __getattr__(name: str) -> Any:
    """Import a callback when it is first asked for: a project that wants one does not wait for the others."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lit_lora.callbacks.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
