"""Adapter training for diffusion models as PyTorch Lightning parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_lora.lazy import lazy_names

if TYPE_CHECKING:
    from lit_lora.callbacks import (
        AdapterCheckpoint,
        AdapterEMA,
        ImageWriter,
        MemoryLimit,
        MemoryProfiler,
        Preemption,
        RunReport,
        SampleImages,
    )
    from lit_lora.datamodules import DataProgress, WebDatasetDataModule, WebDatasetStreamDataModule
    from lit_lora.distributed import LitLoraDeepSpeed, LitLoraFSDP
    from lit_lora.errors import UserError
    from lit_lora.families import Flux, ModelFamily, StableDiffusion, StableDiffusion3, StableDiffusionXL
    from lit_lora.memory.options import MemoryOptions
    from lit_lora.module import LoraDiffusion
    from lit_lora.objectives import DDPM, CosMap, FlowMatching, LogitNormal, Mode, Objective, Uniform
    from lit_lora.sampling import SamplingOptions

__version__ = "0.1.0"

_HOME = {
    "AdapterCheckpoint": "lit_lora.callbacks",
    "AdapterEMA": "lit_lora.callbacks",
    "CosMap": "lit_lora.objectives",
    "DDPM": "lit_lora.objectives",
    "FlowMatching": "lit_lora.objectives",
    "Flux": "lit_lora.families",
    "DataProgress": "lit_lora.datamodules",
    "ImageWriter": "lit_lora.callbacks",
    "LitLoraDeepSpeed": "lit_lora.distributed",
    "LitLoraFSDP": "lit_lora.distributed",
    "LogitNormal": "lit_lora.objectives",
    "LoraDiffusion": "lit_lora.module",
    "Mode": "lit_lora.objectives",
    "ModelFamily": "lit_lora.families",
    "Objective": "lit_lora.objectives",
    "MemoryLimit": "lit_lora.callbacks",
    "MemoryOptions": "lit_lora.memory.options",
    "MemoryProfiler": "lit_lora.callbacks",
    "Preemption": "lit_lora.callbacks",
    "RunReport": "lit_lora.callbacks",
    "SampleImages": "lit_lora.callbacks",
    "SamplingOptions": "lit_lora.sampling",
    "StableDiffusion": "lit_lora.families",
    "StableDiffusion3": "lit_lora.families",
    "StableDiffusionXL": "lit_lora.families",
    "Uniform": "lit_lora.objectives",
    "UserError": "lit_lora.errors",
    "WebDatasetDataModule": "lit_lora.datamodules",
    "WebDatasetStreamDataModule": "lit_lora.datamodules",
}

__all__ = [
    "CosMap",
    "DDPM",
    "FlowMatching",
    "Flux",
    "LogitNormal",
    "Mode",
    "StableDiffusion3",
    "Uniform",
    "AdapterCheckpoint",
    "AdapterEMA",
    "DataProgress",
    "ImageWriter",
    "LitLoraDeepSpeed",
    "LitLoraFSDP",
    "LoraDiffusion",
    "ModelFamily",
    "Objective",
    "MemoryLimit",
    "MemoryOptions",
    "MemoryProfiler",
    "Preemption",
    "RunReport",
    "SampleImages",
    "SamplingOptions",
    "StableDiffusion",
    "StableDiffusionXL",
    "UserError",
    "WebDatasetDataModule",
    "WebDatasetStreamDataModule",
]


__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
