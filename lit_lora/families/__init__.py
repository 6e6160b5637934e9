"""Model families: one file for each kind of diffusion pipeline."""

from lit_lora.families.base import ModelFamily
from lit_lora.families.batch import Batch, Conditioning, source_images, target_size
from lit_lora.families.checks import (
    check_batch,
    check_edits,
    check_single_file,
    check_size,
    editing_families,
    families,
    family_of,
    family_of_source,
    prepare,
)
from lit_lora.families.chroma import Chroma
from lit_lora.families.flux import Flux
from lit_lora.families.flux2 import Flux2
from lit_lora.families.flux_kontext import FluxKontext
from lit_lora.families.krea2 import Krea2
from lit_lora.families.pixart_sigma import PixArtSigma
from lit_lora.families.qwen_image import QwenImage
from lit_lora.families.sana import Sana
from lit_lora.families.source import ModelSource
from lit_lora.families.stable_diffusion import StableDiffusion
from lit_lora.families.stable_diffusion_3 import StableDiffusion3
from lit_lora.families.stable_diffusion_xl import StableDiffusionXL
from lit_lora.families.z_image import ZImage

__all__ = [
    "Batch",
    "Chroma",
    "Conditioning",
    "Flux",
    "Flux2",
    "FluxKontext",
    "Krea2",
    "ModelFamily",
    "ModelSource",
    "PixArtSigma",
    "QwenImage",
    "Sana",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "ZImage",
    "check_batch",
    "check_edits",
    "check_single_file",
    "check_size",
    "editing_families",
    "families",
    "family_of",
    "family_of_source",
    "prepare",
    "source_images",
    "target_size",
]
