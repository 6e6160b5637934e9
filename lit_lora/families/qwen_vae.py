"""What families with Qwen-Image's VAE have in common."""

from __future__ import annotations

from typing import ClassVar

from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from lit_lora.families.packed import PackedFamily

BEFORE_PROMPT = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER_PROMPT = "<|im_end|>\n<|im_start|>assistant\n"
DROPPED_TOKENS = 34
"""Number of tokens of ``BEFORE_PROMPT``, whose embeddings denoisers do not get."""


class QwenVAEFamily(PackedFamily):
    """A family whose latents come from Qwen-Image's VAE, and whose denoiser takes 2 x 2 patches of them as tokens.

    The VAE encodes videos, ``(B, C, frames, h, w)``. Here every video has one frame, which latents are without: ``(B, C, h, w)``.
    """

    vae_class: ClassVar[type[nn.Module]] = AutoencoderKLQwenImage

    @property
    def vae_scale_factor(self) -> int:
        return int(2 ** len(self.vae_config["temperal_downsample"]))

    @property
    def in_channels(self) -> int:
        return 4 * int(self.vae_config["z_dim"])

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        scale = self.vae_scale_factor
        return (int(self.vae_config["z_dim"]), height // scale, width // scale)

    def posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().posterior(pixel_values.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.unsqueeze(2)).squeeze(2)
