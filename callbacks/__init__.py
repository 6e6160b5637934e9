"""Callbacks, for :class:`lit_lora.LoraDiffusion` and, where they say so, for any LightningModule."""

from __future__ import annotations

from lit_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lit_lora.callbacks.adapter_ema import AdapterEMA
from lit_lora.callbacks.image_writer import ImageWriter
from lit_lora.callbacks.sample_images import SampleImages

__all__ = ["AdapterCheckpoint", "AdapterEMA", "ImageWriter", "SampleImages"]
