"""What families whose denoisers take 2 x 2 patches of the latents as tokens have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_lora.families.base import ModelFamily
from lit_lora.families.batch import Conditioning
from lit_lora.families.packing import pack, unpack


class PackedFamily(ModelFamily):
    """A family whose denoiser takes each 2 x 2 patch of the latents as one token, and times from 0 to 1."""

    @property
    def size_multiple(self) -> int:
        return 2 * self.vae_scale_factor

    @property
    def default_size(self) -> int:
        return 128 * self.vae_scale_factor

    @property
    def in_channels(self) -> int:
        return 4 * super().in_channels

    def num_tokens(self, latent_shape: Sequence[int]) -> int:
        return latent_shape[-2] // 2 * (latent_shape[-1] // 2)

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prediction = super().denoise(pack(noisy), timesteps / 1000, conditioning)
        return unpack(prediction, *noisy.shape[-2:])
