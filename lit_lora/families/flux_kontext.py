"""FLUX.1 Kontext."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline
from torch import Tensor

from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.flux import Flux
from lit_lora.families.packing import pack, positions, unpack

_SOURCE = "source"
"""Entry of the conditioning with the source's tokens, which are no argument of the denoiser."""


class FluxKontext(Flux):
    """FLUX.1 Kontext dev (Black Forest Labs, 2025, arXiv 2506.15742), which edits a source image by an instruction.

    The source's latents are tokens after those of the image that is drawn, at the same rows and columns; the first coordinate of
    their positions is 1 instead of 0. They are the mode of the VAE's posterior, without noise, and the denoiser's output for them
    is not used. A batch without sources is trained as text to image, which the pipeline can do too.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, hub id, or .safetensors file with the
            whole model or its denoiser.
        train_guidance_scale: Guidance scale that the denoiser gets as input in training, at least 0; defaults to 1.
        max_sequence_length: Number of tokens of an instruction for T5, at most 512; defaults to 512, as in the pipeline.
        **options: Further options of :class:`ModelFamily`.

    Raises:
        UserError: If a value is outside its range.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxKontextPipeline
    takes_sources: ClassVar[bool] = True
    undistilled: ClassVar[str] = "black-forest-labs/FLUX.1-Kontext-dev"

    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        conditioning = super().conditioning(text, batch, latents)
        source = self._source_latents(batch)
        if source is None:
            return conditioning
        ids = positions(source.shape[-2] // 2, source.shape[-1] // 2, latents.device)
        ids[:, 0] = 1
        img_ids = torch.cat([conditioning["img_ids"], ids])
        return conditioning | {"img_ids": img_ids, _SOURCE: pack(source.to(latents.dtype))}

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        if _SOURCE not in conditioning:
            return super().denoise(noisy, timesteps, conditioning)
        arguments = {name: value for name, value in conditioning.items() if name != _SOURCE}
        tokens = pack(noisy)
        both = torch.cat([tokens, conditioning[_SOURCE].to(tokens.dtype)], dim=1)
        prediction = self.denoiser(both, timestep=timesteps / 1000, **arguments).sample
        return unpack(prediction[:, : tokens.shape[1]], *noisy.shape[-2:])

    def drawing_options(self, height: int, width: int) -> dict[str, Any]:
        # Without these the pipeline would draw a megapixel, whatever it is asked for.
        return {"max_area": height * width, "_auto_resize": False}

    def _source_latents(self, batch: Batch) -> Tensor | None:
        """Normalized latents of the sources, float32 ``(B, *latent_shape)``; None for a batch without sources."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if "source_latents" in batch:
                return self.normalize_latents(batch["source_latents"].float())
            if "source_pixel_values" in batch:
                return self.normalize_latents(self.posterior(batch["source_pixel_values"])[0].float())
        return None
