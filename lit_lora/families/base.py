"""What a model family is: the parts of a diffusion pipeline and how one training step uses them."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_lora.adapters import inject
from lit_lora.distributed.node import Node
from lit_lora.draws import Draws
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.loading import PartLoader
from lit_lora.families.source import ModelSource
from lit_lora.objectives import DDPM, Objective
from lit_lora.quantization import Dense, Quantization

_DISTILLED = re.compile(r"(?<![a-z])(turbo|lightning|lcm|hyper|schnell)(?![a-z])", re.IGNORECASE)
"""In the names of models that are distilled to few steps."""

PARTS = ("vae", "text", "denoiser")
"""What can be left out when a family is loaded: ``text`` is all tokenizers and text encoders."""


class ModelFamily(nn.Module, ABC):
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

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """The diffusers pipeline that the family trains for: sampling and file formats."""
    denoiser_class: ClassVar[type[nn.Module]]
    denoiser_name: ClassVar[str]
    """Name of the denoiser in the pipeline: ``unet`` or ``transformer``."""
    vae_class: ClassVar[type[nn.Module]] = AutoencoderKL
    encoder_classes: ClassVar[dict[str, type[Any]]]
    """Tokenizers and text encoders of the pipeline by name."""
    optional_encoders: ClassVar[frozenset[str]] = frozenset()
    """Those of them that a pipeline may lack."""
    block_classes: ClassVar[tuple[str, ...]]
    """Class names of the denoiser's repeated blocks: what is sharded, compiled or offloaded as one."""
    default_targets: ClassVar[tuple[str, ...]]
    """Layers that an adapter takes where its config names none."""
    default_objective: ClassVar[type[Objective]] = DDPM
    """The objective that the family's models were trained with."""
    always_dense: ClassVar[tuple[str, ...]] = ()
    """Glob patterns of the denoiser's layers that stay in the base's dtype under every quantization."""
    default_vae_dtype: ClassVar[torch.dtype | None] = None
    """dtype of the VAE; defaults to the base's dtype unless the VAE overflows in that."""
    text_masks: ClassVar[Mapping[str, str]] = {}
    """For entries of :meth:`encode_captions` whose tokens are masked, ``(B, tokens, …)``, the entry with the mask,
    ``(B, tokens)``, 0 for padding. A cache stores them without their padding, and gives them back padded with zeros."""
    undistilled: ClassVar[str] = "the model that it was distilled from"
    """What to train on in place of a model that is distilled to few steps."""
    pipeline_options: ClassVar[dict[str, Any]] = {}
    """Further arguments of the pipeline's constructor."""

    scheduler_config: dict[str, Any]
    vae_config: dict[str, Any]
    denoiser_config: dict[str, Any]
    """Configs with their defaults filled in; :meth:`read_configs` reads them, without any weights."""
    vae: Any
    denoiser: Any
    encoders: dict[str, Any]
    """Tokenizers and text encoders that are loaded, by name."""

    def __init__(
        self, pretrained_model_name_or_path: str, revision: str | None = None, variant: str | None = None
    ) -> None:
        super().__init__()
        self.source = ModelSource(pretrained_model_name_or_path, revision, variant)
        self._forget()
        self.vae_slicing = self.vae_tiling = False

    # What a family says of its models.

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
    def trainable_base(self) -> str | None:
        """The model to train on instead, if this one is distilled to few steps; None if it is not.

        By default a model is distilled if its name or its configs say so.
        """
        return self.undistilled if self._looks_distilled() else None

    def skips(self, encoder: str) -> bool:
        """Whether one of :attr:`encoder_classes` is not loaded: by default if the pipeline may lack it, and does."""
        return encoder in self.optional_encoders and self.source.lacks(encoder)

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
        return {"prompt": prompts}

    # What is the same for all families.

    @property
    def pretrained_model_name_or_path(self) -> str:
        """Where the family's pipeline is, as it was given."""
        return self.source.path

    def read_configs(self) -> None:
        """Read the configs of scheduler, VAE and denoiser, if they were not read before.

        Raises:
            UserError: If a part is missing or its config cannot be read.
        """
        if not hasattr(self, "denoiser_config"):
            self.scheduler_config = self.source.config("scheduler")
            self.vae_config = self.source.config("vae", self.vae_class)
            self.denoiser_config = self.source.config(self.denoiser_name, self.denoiser_class)

    def load(
        self,
        dtype: torch.dtype,
        vae_dtype: torch.dtype | None = None,
        without: Collection[str] = (),
        quantization: Quantization | None = None,
        weights: bool = True,
        node: Node | None = None,
    ) -> None:
        """Load the parts, frozen. What is loaded already stays as it is.

        Args:
            dtype: dtype of the denoiser and the text encoders.
            vae_dtype: dtype of the VAE; by default :attr:`default_vae_dtype`, and ``dtype`` where that is None.
            without: Parts to leave out, of :data:`PARTS`; :meth:`all_parts` brings them in for a while.
            quantization: How the weights of the denoiser's layers are stored; in ``dtype`` by default.
            weights: False makes the parts from their configs, with values that mean nothing.
            node: Which process reads the files for the others; by default each process reads them itself.

        Raises:
            UserError: If a part is missing or cannot be read.
        """
        self.dtype = dtype
        self.vae_dtype = vae_dtype or self.default_vae_dtype or dtype
        self.loader = PartLoader(
            self.source, dtype, quantization or Dense(), self.always_dense, weights, node or Node()
        )
        self.read_configs()
        for part in self._missing():
            if part not in without:
                self._load_part(part)

    def load_adapted(self, config: PeftConfig, shard: Callable[[nn.Module], None]) -> None:
        """Load the denoiser with the adapter in it, block by block, after :meth:`load` without the denoiser.

        It gives what :meth:`load` and :meth:`add_adapter` give, the adapter with the first process's values.

        Args:
            config: The adapter's.
            shard: See :meth:`~lit_lora.families.loading.PartLoader.sharded_denoiser`.

        Raises:
            UserError: As for these, or if it is not known how the adapter begins without the base's weights.
        """

        def adapt(denoiser: nn.Module) -> nn.Module:
            return inject(denoiser, config, self.default_targets)

        self.denoiser = self.loader.sharded_denoiser(
            self.denoiser_name, self.denoiser_class, self.block_classes, adapt, config, shard
        )

    def add_adapter(self, config: PeftConfig) -> None:
        """Put the adapter into the denoiser; :attr:`denoiser` becomes a :class:`peft.PeftModel`.

        Raises:
            UserError: As :func:`lit_lora.adapters.inject`.
        """
        self.denoiser = inject(self.denoiser, config, self.default_targets)

    @contextmanager
    def all_parts(self) -> Iterator[None]:
        """Inside the block every part is there; those that were left out of :meth:`load` are freed at its end.

        Raises:
            UserError: If a part is missing or cannot be read.
        """
        device = self.device
        missing = self._missing()
        try:
            for part in missing:
                self._load_part(part, device)
            yield
        finally:
            for part in missing:
                self._free_part(part)

    def split_vae(self, slicing: bool, tiling: bool) -> None:
        """Have the VAE work on one image at a time (slicing), or on one tile of a large one (tiling): diffusers' names."""
        self.vae_slicing, self.vae_tiling = slicing, tiling
        if self.vae is not None:
            (self.vae.enable_slicing if slicing else self.vae.disable_slicing)()
            (self.vae.enable_tiling if tiling else self.vae.disable_tiling)()

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        model = self if self.denoiser is None else self.denoiser
        parameter = next(model.parameters())
        if isinstance(parameter, DTensor):  # it may wait elsewhere
            kind = parameter.device_mesh.device_type
            return torch.device(kind if kind == "cpu" else torch.get_device_module(kind).current_device())
        return parameter.device

    def encoding_models(self) -> list[nn.Module]:
        """VAE and text encoders, as far as they are loaded."""
        return [model for name, model in self.named_children() if name != "denoiser"]

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

    def pipeline(self, scheduler_config: Mapping[str, Any] | None = None) -> DiffusionPipeline:
        """A diffusers pipeline over these very weights, adapter included.

        It needs every part: see :meth:`all_parts`.

        Args:
            scheduler_config: The scheduler to sample with; the base's own by default.
        """
        config = scheduler_config or self.scheduler_config
        scheduler_class = getattr(diffusers, config["_class_name"])
        denoiser = self.denoiser.get_base_model() if isinstance(self.denoiser, PeftModel) else self.denoiser
        pipeline = self.pipeline_class(
            vae=self.vae,
            scheduler=scheduler_class.from_config(config),
            **{self.denoiser_name: denoiser},
            **(dict.fromkeys(self.optional_encoders) | self.encoders),
            **self.pipeline_options,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the denoiser; the frozen encoders stay in evaluation mode."""
        super().train(mode)
        for model in self.encoding_models():
            model.eval()
        return self

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

    def _looks_distilled(self) -> bool:
        scheduler = self.scheduler_config
        few_steps = scheduler.get("_class_name") in ("LCMScheduler", "TCDScheduler")
        # How SD-Turbo and SDXL-Turbo are sampled.
        turbo = scheduler.get("_class_name", "").startswith("Euler") and scheduler.get("timestep_spacing") == "trailing"
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

    def _missing(self) -> list[str]:
        """Those of :data:`PARTS` that are not loaded."""
        loaded = {"vae": self.vae, "text": self.encoders, "denoiser": self.denoiser}
        return [part for part in PARTS if not loaded[part]]

    def _load_part(self, part: str, device: torch.device | None = None) -> None:
        def placed(model: Any) -> Any:
            return model if device is None or not isinstance(model, nn.Module) else model.to(device)

        if part == "text":
            classes = {name: kind for name, kind in self.encoder_classes.items() if not self.skips(name)}
            self.encoders = {name: placed(self.loader.encoder(name, kind)) for name, kind in classes.items()}
            for name, encoder in self.encoders.items():
                if isinstance(encoder, nn.Module):
                    self.add_module(name, encoder)
        elif part == "vae":
            self.vae = placed(self.loader.encoder("vae", self.vae_class, self.vae_dtype))
            self.split_vae(self.vae_slicing, self.vae_tiling)
        else:
            self.denoiser = placed(self.loader.denoiser(self.denoiser_name, self.denoiser_class))

    def _free_part(self, part: str) -> None:
        if part == "text":
            for name in self.encoders:
                self._modules.pop(name, None)
            self.encoders = {}
        else:
            setattr(self, part, None)

    def unloaded(self) -> Self:
        """A copy with the same settings, as it was before anything was loaded or read; this one stays as it is."""
        fresh = copy.copy(self)
        fresh._modules = {}
        fresh._forget()
        for name in ("scheduler_config", "vae_config", "denoiser_config"):
            fresh.__dict__.pop(name, None)
        return fresh

    def _forget(self) -> None:
        self.vae = self.denoiser = None
        self.encoders = {}
