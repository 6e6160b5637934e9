"""Model families: one file for each kind of diffusion pipeline."""

from lit_lora.families.base import ModelFamily
from lit_lora.families.batch import Batch, Conditioning, target_size
from lit_lora.families.checks import check_batch, check_size, families, family_of, prepare
from lit_lora.families.flux import Flux
from lit_lora.families.krea2 import Krea2
from lit_lora.families.qwen_image import QwenImage
from lit_lora.families.source import ModelSource
from lit_lora.families.stable_diffusion import StableDiffusion
from lit_lora.families.stable_diffusion_3 import StableDiffusion3
from lit_lora.families.stable_diffusion_xl import StableDiffusionXL

__all__ = [
    "Batch",
    "Conditioning",
    "Flux",
    "Krea2",
    "ModelFamily",
    "ModelSource",
    "QwenImage",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "check_batch",
    "check_size",
    "families",
    "family_of",
    "prepare",
    "target_size",
]
