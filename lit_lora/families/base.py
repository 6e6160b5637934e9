"""What a model family is: the parts of a diffusion pipeline and how one training step uses them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from lit_lora.adapters import ADAPTER_NAME, adapter_state, inject, is_lora, plain_config, save_peft_files
from lit_lora.draws import Draws
from lit_lora.embedded import resolve
from lit_lora.errors import UserError

Batch = Mapping[str, Any]
"""What a datamodule gives, ``B`` samples:

| key | value |
|---|---|
| ``pixel_values`` | uint8 in [0, 255] or float in [-1, 1], ``(B, 3, H, W)`` |
| ``caption`` | list of ``B`` strings |
| ``original_size`` | int64 ``(B, 2)``: height, width before resizing (optional) |
| ``crop_top_left`` | int64 ``(B, 2)``: top, left of the crop in resized pixels (optional) |
| ``weight`` | float32 ``(B,)``: 0 for a slot that must not count (optional) |
| ``slot`` | list of ``B`` ints: number of the sample's place in the whole run (optional) |
| ``key`` | list of ``B`` strings, the samples' names (optional) |
"""

Conditioning = dict[str, Any]
"""Keyword arguments of the denoiser's ``forward``."""


class ModelFamily(nn.Module, ABC):
    """The models of one kind of diffusion pipeline, loaded from a diffusers folder or hub id.

    The constructor keeps strings and numbers; :meth:`load` brings the weights in. A subclass names its parts in the
    class attributes, says how a batch becomes latents and conditioning, and needs no change anywhere else.

    Args:
        pretrained_model_name_or_path: A folder that diffusers' ``save_pretrained`` wrote, a hub id, or ``embedded`` for
            the small model that ships with the package.
        revision: Branch, tag or commit on the hub.
        variant: Weight files of this variant, such as ``fp16``.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """The diffusers pipeline that the family trains for: sampling and file formats."""
    denoiser_class: ClassVar[type[nn.Module]]
    denoiser_name: ClassVar[str]
    """Name of the denoiser in the pipeline: ``unet`` or ``transformer``."""
    encoder_classes: ClassVar[dict[str, type[Any]]]
    """Tokenizers and text encoders of the pipeline by name."""
    block_classes: ClassVar[tuple[str, ...]]
    """Class names of the denoiser's repeated blocks: what is sharded, compiled or offloaded as one."""
    default_targets: ClassVar[tuple[str, ...]]
    """Layers that an adapter takes where its config names none."""
    pipeline_options: ClassVar[dict[str, Any]] = {}
    """Further arguments of the pipeline's constructor."""

    vae: AutoencoderKL
    scheduler_config: dict[str, Any]

    def __init__(
        self, pretrained_model_name_or_path: str, revision: str | None = None, variant: str | None = None
    ) -> None:
        super().__init__()
        self.pretrained_model_name_or_path = pretrained_model_name_or_path
        self.revision = revision
        self.variant = variant
        self.encoders: dict[str, Any] = {}

    def load(self, dtype: torch.dtype, vae_dtype: torch.dtype | None = None) -> None:
        """Load every part, frozen.

        Args:
            dtype: Of the denoiser and the text encoders.
            vae_dtype: Of the VAE; ``dtype`` if not given.

        Raises:
            UserError: A part is missing or cannot be read.
        """
        self.scheduler_config = dict(self._part("scheduler", DDPMScheduler.load_config))
        for name, encoder_class in self.encoder_classes.items():
            options = {"dtype": dtype} if issubclass(encoder_class, nn.Module) else {}
            part = self._part(name, encoder_class.from_pretrained, **options)
            self.encoders[name] = part
            if isinstance(part, nn.Module):
                self.add_module(name, part.requires_grad_(False))
        self.vae = self._part("vae", AutoencoderKL.from_pretrained, dtype=vae_dtype or dtype).requires_grad_(False)
        from_pretrained = self.denoiser_class.from_pretrained  # type: ignore[attr-defined]
        self.denoiser: Any = self._part(self.denoiser_name, from_pretrained, dtype=dtype).requires_grad_(False)

    def add_adapter(self, config: PeftConfig) -> None:
        """Put the adapter into the denoiser; :attr:`denoiser` becomes a :class:`peft.PeftModel`.

        Raises:
            UserError: See :func:`lit_lora.adapters.inject`.
        """
        self.denoiser = inject(self.denoiser, config, self.default_targets)

    @abstractmethod
    def encode(self, batch: Batch, draws: Draws) -> tuple[Tensor, Conditioning]:
        """Latents, float32 ``(B, C, h, w)``, and the denoiser's conditioning; without gradients."""

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction, ``(B, C, h, w)``.

        Args:
            noisy: ``(B, C, h, w)``.
            timesteps: int64 ``(B,)``.
            conditioning: What :meth:`encode` gave.
        """
        prediction: Tensor = self.denoiser(noisy, timesteps, **conditioning).sample
        return prediction

    def encode_images(self, pixel_values: Tensor, draws: Draws) -> Tensor:
        """Images to scaled latents, drawn from the VAE's posterior: float32 ``(B, C, h, w)``.

        Args:
            pixel_values: uint8 in [0, 255] or float in [-1, 1], ``(B, 3, H, W)``.
            draws: Gives the posterior's noise.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = pixel_values.float() / 127.5 - 1
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        latents = mean + std * draws.normal("posterior", mean.shape[1:])
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * float(self.vae.config.scaling_factor)

    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline over these very weights, adapter included, with the base's own scheduler."""
        scheduler_class = getattr(diffusers, self.scheduler_config["_class_name"])
        denoiser = self.denoiser.get_base_model() if isinstance(self.denoiser, PeftModel) else self.denoiser
        pipeline = self.pipeline_class(
            vae=self.vae,
            scheduler=scheduler_class.from_config(self.scheduler_config),
            **{self.denoiser_name: denoiser},
            **self.encoders,
            **self.pipeline_options,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT's files and, where diffusers knows the method, as diffusers' LoRA file."""
        config = self.denoiser.peft_config[ADAPTER_NAME]
        plain = plain_config(config) | {"base_model_name_or_path": self.pretrained_model_name_or_path}
        state = adapter_state(self.denoiser)
        save_peft_files(state, plain, folder)
        if is_lora(config):
            self.pipeline_class.save_lora_weights(
                folder,
                **{
                    f"{self.denoiser_name}_lora_layers": {
                        key.removeprefix("base_model.model."): value for key, value in state.items()
                    },
                    f"{self.denoiser_name}_lora_adapter_metadata": plain,
                },
            )

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the denoiser; the frozen encoders stay in evaluation mode."""
        super().train(mode)
        for name, child in self.named_children():
            if name != "denoiser":
                child.eval()
        return self

    def tokenize(self, tokenizer: Any, captions: list[str]) -> Tensor:
        """int64 ``(B, tokens)``, padded and cut to the tokenizer's length, on the VAE's device."""
        encoded = tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        return ids.to(self.vae.device)

    def _part(self, name: str, from_pretrained: Any, **options: Any) -> Any:
        """One part of the pipeline, or a :class:`UserError` that says which part is missing where."""
        source = resolve(self.pretrained_model_name_or_path)
        if Path(source).is_dir() and not (Path(source) / name).is_dir():
            raise UserError(
                f"{source} has no folder {name!r}, so it is no complete {self.pipeline_class.__name__}; it holds "
                f"{', '.join(sorted(p.name for p in Path(source).iterdir())) or 'nothing'}. Give a folder that diffusers' "
                f"save_pretrained wrote, or a hub id."
            )
        if self.variant and issubclass(getattr(from_pretrained, "__self__", object), nn.Module):
            options["variant"] = self.variant
        if self.revision:
            options["revision"] = self.revision
        try:
            return from_pretrained(source, subfolder=name, **options)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(f"cannot load {name!r} of {source!r}: {error}") from error
