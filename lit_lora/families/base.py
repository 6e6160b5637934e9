"""What a model family is: how one training step uses the parts of a diffusion pipeline."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.parts import PipelineParts
from lit_lora.objectives import DDPM, Objective
from lit_lora.sampling import generate, text_prompts

_DISTILLED = re.compile(r"(?<![a-z])(turbo|lightning|lcm|hyper|schnell)(?![a-z])", re.IGNORECASE)
"""In the names of models that are distilled to few steps."""


class ModelFamily(PipelineParts, ABC):
    """The models of one kind of diffusion pipeline, loaded from a diffusers folder or hub id.

    A subclass in a file of its own is all that a new family takes. It names the pipeline's parts in class attributes and
    says how captions are encoded and how the denoiser is called; latents are ``(B, *latent_shape)`` everywhere else, noise
    levels are timesteps in the scheduler's units, and whatever the denoiser wants otherwise (packing, sign, another time)
    is done in :meth:`denoise`.

    The constructor keeps strings and numbers; :meth:`load` brings the weights in.

    Args:
        pretrained_model_name_or_path: A folder that diffusers' ``save_pretrained`` wrote, a hub id, or ``embedded`` for
            the small model that ships with the package.
        revision: Branch, tag or commit on the hub.
        variant: Weight files of this variant, such as ``fp16``.
    """

    default_objective: ClassVar[type[Objective]] = DDPM
    """The objective that the family's models were trained with."""
    text_masks: ClassVar[Mapping[str, str]] = {}
    """For entries of :meth:`encode_captions` whose tokens are masked, ``(B, tokens, …)``, the entry with the mask,
    ``(B, tokens)``, 0 for padding. A cache stores them without their padding, and gives them back padded with zeros."""
    undistilled: ClassVar[str] = "the model that it was distilled from"
    """What to train on in place of a model that is distilled to few steps."""

    @property
    def vae_scale_factor(self) -> int:
        """Edge of an image by edge of its latents."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """Heights and widths of images have to be multiples of this, in pixels."""
        return self.vae_scale_factor

    @property
    def default_size(self) -> int:
        """Edge of the images that the pipeline draws if no size is given, in pixels."""
        return int(self.denoiser_config.get("sample_size") or 64) * self.vae_scale_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of one image, such as ``(C, h, w)``.

        Args:
            height: Of the image, in pixels.
            width: Of the image, in pixels.
        """
        scale = self.vae_scale_factor
        return (int(self.vae_config["latent_channels"]), height // scale, width // scale)

    def num_tokens(self, latent_shape: Sequence[int]) -> int:
        """Tokens that the denoiser makes of the latents of one image: for timestep shifts that depend on the resolution."""
        return int(latent_shape[-2] * latent_shape[-1]) // int(self.denoiser_config.get("patch_size") or 1) ** 2

    @property
    def in_channels(self) -> int:
        """What the denoiser's config must have as ``in_channels``, if it denoises latents and takes nothing else."""
        return int(self.vae_config["latent_channels"])

    @property
    def text_settings(self) -> dict[str, Any]:
        """Settings of this family that the text embeddings depend on, beside the text encoders: for caches."""
        return {}

    @abstractmethod
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Everything that the denoiser is told of ``B`` captions, by name: ``(B, …)`` each, masks included."""

    @abstractmethod
    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        """The denoiser's conditioning.

        Args:
            text: What :meth:`encode_captions` gave, now or when the cache was made.
            batch: What else the denoiser may be told, such as image sizes.
            latents: ``(B, *latent_shape)``, for positions that depend on their size.
        """

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction, ``(B, *latent_shape)``.

        Args:
            noisy: ``(B, *latent_shape)``.
            timesteps: int64 or float32 ``(B,)``, in the scheduler's units.
            conditioning: What :meth:`conditioning` gave.
        """
        prediction: Tensor = self.denoiser(noisy, timestep=timesteps, **conditioning).sample
        return prediction

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """From the VAE's latents to what the denoiser was trained on, as the VAE's config says.

        With ``latents_mean`` and ``latents_std`` these, by channel; otherwise ``shift_factor`` and ``scaling_factor``.
        """
        mean, factor = self._latent_statistics(latents)
        return (latents - mean) * factor

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalize_latents`."""
        mean, factor = self._latent_statistics(latents)
        return latents / factor + mean

    def posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents before they are normalised, in the VAE's dtype, ``(B, *latent_shape)``.

        Args:
            pixel_values: uint8 in [0, 255] or float in [-1, 1], ``(B, 3, H, W)``.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = pixel_values.float() / 127.5 - 1
        encoded = self.vae.encode(pixel_values.to(self.vae.dtype))
        if not hasattr(encoded, "latent_dist"):  # an autoencoder without randomness
            return encoded.latent, torch.zeros_like(encoded.latent)
        return encoded.latent_dist.mean, encoded.latent_dist.std

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], ``(B, 3, H, W)``, from normalised latents ``(B, *latent_shape)``."""
        images: Tensor = self.vae.decode(self.denormalize_latents(latents).to(self.vae.dtype), return_dict=False)[0]
        return images

    def sampling_passes(self, guidance_scale: float) -> int:
        """How often the denoiser sees each image in one step of sampling: twice under classifier-free guidance."""
        return 2 if guidance_scale > 1 else 1

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """The pipeline's arguments that stand for the prompts."""
        return text_prompts(prompts, guidance_scale)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        scheduler_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """One image for each prompt, with the weights as they are; it needs every part: see :meth:`all_parts`.

        Args:
            prompts: What to draw.
            seeds: One for each prompt.
            scheduler_config: The scheduler to sample with; the base's own by default.
            **options: Further options of :func:`lit_lora.sampling.generate`.
        """
        with self._vae_in_its_own_dtype():
            pipeline = self.pipeline(scheduler_config)
            return generate(pipeline, prompts, seeds, prompt_inputs=self.prompt_inputs, **options)

    def identity(self) -> dict[str, str]:
        """What latents (``"vae"``) and embeddings (``"text"``) of a cache depend on, as texts to compare.

        A local folder is known by its contents, wherever it lies: see :mod:`lit_lora.families.identity`. A part whose
        folder has no weights is not mentioned.
        """
        identity = self.source.identity({"vae": ["vae"], "text": list(self.encoder_classes)})
        if "text" in identity:
            settings = [f"{name}={value}" for name, value in sorted(self.text_settings.items())]
            identity["text"] = ";".join([identity["text"], *settings])
        return identity

    def encode(self, batch: Batch, draws: Draws) -> tuple[Tensor, Conditioning]:
        """Normalised latents, float32 ``(B, *latent_shape)``, and the denoiser's conditioning; without gradients."""
        text = batch["text_embeddings"] if "text_embeddings" in batch else self.encode_captions(batch["caption"])
        text = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in text.items()}
        latents = self.latents(batch, draws)
        return latents, self.conditioning(text, batch, latents)

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Normalised latents, drawn from the VAE's posterior: float32 ``(B, *latent_shape)``.

        Args:
            batch: With the posterior, or with images.
            draws: Gives the posterior's noise.
        """
        if "latents_mean" in batch:
            mean, std = batch["latents_mean"], batch["latents_std"]
        else:
            mean, std = self.posterior(batch["pixel_values"])
        return self.normalize_latents(mean.float() + std.float() * draws.normal("posterior", mean.shape[1:]))

    def tokenize(self, tokenizer: Any, captions: list[str], max_length: int | None = None) -> Tensor:
        """int64 ``(B, max_length)``, padded and cut, on the weights' device.

        Args:
            tokenizer: One of :attr:`encoders`.
            captions: ``B`` of them.
            max_length: Tokens; the tokenizer's own length by default.
        """
        encoded = tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=max_length or tokenizer.model_max_length,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        return ids.to(self.device)

    @contextmanager
    def _vae_in_its_own_dtype(self) -> Iterator[None]:
        """Keep other dtypes and autocast off the VAE's decoder, which overflows in half precision for some families."""
        vae = self.vae
        decode = vae.decode

        def decode_without_autocast(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast(latents.device.type, enabled=False):
                return decode(latents.to(vae.dtype), *args, **kwargs)

        vae.decode = decode_without_autocast
        try:
            yield
        finally:
            del vae.decode

    @property
    def is_distilled(self) -> bool:
        """Whether the model is distilled to few steps, as far as its name and its configs tell."""
        scheduler = self.scheduler_config
        few_steps = scheduler.get("_class_name") in ("LCMScheduler", "TCDScheduler")
        # How SD-Turbo and SDXL-Turbo are sampled.
        euler = scheduler.get("_class_name", "").startswith("Euler") and not scheduler.get("rescale_betas_zero_snr")
        turbo = euler and scheduler.get("timestep_spacing") == "trailing"
        guidance_embedded = self.denoiser_config.get("time_cond_proj_dim") is not None
        return few_steps or turbo or guidance_embedded or bool(_DISTILLED.search(Path(self.source.path).name))

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What to subtract from the VAE's latents, and what to multiply with."""
        config = self.vae_config
        scale = float(config.get("scaling_factor") or 1.0)
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return float(config.get("shift_factor") or 0.0), scale
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (latents.new_tensor(config[name]).view(shape) for name in ("latents_mean", "latents_std"))
        return mean, scale / std
