"""Model families: one file each."""

from lit_lora.families.base import Batch, Conditioning, ModelFamily, target_size
from lit_lora.families.stable_diffusion import StableDiffusion
from lit_lora.families.stable_diffusion_xl import StableDiffusionXL

__all__ = ["Batch", "Conditioning", "ModelFamily", "StableDiffusion", "StableDiffusionXL", "target_size"]
