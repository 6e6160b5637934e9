"""Adapter training for diffusion models as PyTorch Lightning parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_lora.lazy import lazy_names

if TYPE_CHECKING:
    from lit_lora.callbacks import (
        AdapterCheckpoint,
        AdapterEMA,
        ImageWriter,
        MemoryProfiler,
        Preemption,
        RunReport,
        SampleImages,
    )
    from lit_lora.datamodules import DataProgress, WebDatasetDataModule, WebDatasetStreamDataModule
    from lit_lora.distributed import LitLoraDeepSpeed, LitLoraFSDP
    from lit_lora.errors import UserError
    from lit_lora.families import ModelFamily, StableDiffusion, StableDiffusionXL
    from lit_lora.module import LoraDiffusion
    from lit_lora.objectives import DDPM, Objective

__version__ = "0.1.0"

_HOME = {
    "AdapterCheckpoint": "lit_lora.callbacks",
    "AdapterEMA": "lit_lora.callbacks",
    "DDPM": "lit_lora.objectives",
    "DataProgress": "lit_lora.datamodules",
    "ImageWriter": "lit_lora.callbacks",
    "LitLoraDeepSpeed": "lit_lora.distributed",
    "LitLoraFSDP": "lit_lora.distributed",
    "LoraDiffusion": "lit_lora.module",
    "ModelFamily": "lit_lora.families",
    "Objective": "lit_lora.objectives",
    "MemoryProfiler": "lit_lora.callbacks",
    "Preemption": "lit_lora.callbacks",
    "RunReport": "lit_lora.callbacks",
    "SampleImages": "lit_lora.callbacks",
    "StableDiffusion": "lit_lora.families",
    "StableDiffusionXL": "lit_lora.families",
    "UserError": "lit_lora.errors",
    "WebDatasetDataModule": "lit_lora.datamodules",
    "WebDatasetStreamDataModule": "lit_lora.datamodules",
}

__all__ = [
    "DDPM",
    "AdapterCheckpoint",
    "AdapterEMA",
    "DataProgress",
    "ImageWriter",
    "LitLoraDeepSpeed",
    "LitLoraFSDP",
    "LoraDiffusion",
    "ModelFamily",
    "Objective",
    "MemoryProfiler",
    "Preemption",
    "RunReport",
    "SampleImages",
    "StableDiffusion",
    "StableDiffusionXL",
    "UserError",
    "WebDatasetDataModule",
    "WebDatasetStreamDataModule",
]


__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
