"""Model families: one file for each kind of diffusion pipeline."""

from lit_lora.families.base import ModelFamily
from lit_lora.families.batch import Batch, Conditioning, target_size
from lit_lora.families.checks import (
    check_batch,
    check_single_file,
    check_size,
    families,
    family_of,
    family_of_source,
    prepare,
)
from lit_lora.families.flux import Flux
from lit_lora.families.source import ModelSource
from lit_lora.families.stable_diffusion import StableDiffusion
from lit_lora.families.stable_diffusion_3 import StableDiffusion3
from lit_lora.families.stable_diffusion_xl import StableDiffusionXL

__all__ = [
    "Batch",
    "Conditioning",
    "Flux",
    "ModelFamily",
    "ModelSource",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "check_batch",
    "check_single_file",
    "check_size",
    "families",
    "family_of",
    "family_of_source",
    "prepare",
    "target_size",
]
