"""The interface of a model family: how a training step uses the parts of a diffusion pipeline."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image
from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.draws import Draws
from lit_lora.families.batch import Batch, Conditioning
from lit_lora.families.cut_captions import tell_cut_captions
from lit_lora.families.native_layers import NativeLayer
from lit_lora.families.parts import PipelineParts
from lit_lora.families.source import ModelSource
from lit_lora.objectives import DDPM, Objective
from lit_lora.quantization import Dense
from lit_lora.sampling import generate, text_prompts
from lit_lora.to_device import to_device

_DISTILLED = re.compile(r"(?<![a-z])(turbo|lightning|lcm|hyper|schnell)(?![a-z])", re.IGNORECASE)
"""Words in the names of models that are distilled to few steps."""


EncodingSteps = Generator[str, None, dict[str, Tensor]]
"""A generator of names of text encoders, with the result of :meth:`ModelFamily.encode_captions`."""


class ModelFamily(PipelineParts, ABC):
    """The models of one kind of diffusion pipeline, loaded from a diffusers folder or hub id.

    A new family is one subclass in a file of its own. It names the pipeline's parts in class attributes and defines how captions
    are encoded and how the denoiser is called. Everywhere else latents are ``(B, *latent_shape)`` and noise levels are timesteps
    in the scheduler's units; :meth:`denoise` converts them to what the denoiser expects (packing, sign, time scale).

    The constructor only stores its arguments; :meth:`load` loads the weights.

    Args:
        pretrained_model_name_or_path: Folder that diffusers' ``save_pretrained`` wrote, hub id, .safetensors file with the whole
            model or its denoiser, or ``embedded`` for the small model that ships with the package.
        revision: Branch, tag or commit on the hub; defaults to the hub's default branch.
        variant: Variant of the weight files, such as ``fp16``; defaults to the files without a variant, or else to the only
            variant that a part has.
        vae: VAE to use instead of the pipeline's, of the same kind: a folder or hub id, of the VAE or of a pipeline, or a
            .safetensors file; defaults to the pipeline's own.
        config: For a model in one file, folder or hub id of a pipeline with the configs, the tokenizers and the parts that the
            file does not have; defaults to the repository on the hub that diffusers takes for its kind.
    """

    single_file_types: ClassVar[frozenset[str]] = frozenset()
    """Models in one file that are of this family, in the words of diffusers' ``infer_diffusers_model_type``; none by default,
    and then files of unknown kind are taken."""
    default_objective: ClassVar[type[Objective]] = DDPM
    """Objective with which the family's models were trained; defaults to :class:`DDPM`."""
    text_masks: ClassVar[Mapping[str, str]] = {}
    """Names of masked entries of :meth:`encode_captions`, ``(B, tokens, …)``, each with the name of its mask's entry,
    ``(B, tokens)``, 0 for padding. A cache stores masked entries without padding and pads them with zeros when it reads them."""
    naming: ClassVar[tuple[str, ...]] = ()
    """Entries of the denoiser's config on which :meth:`native_layers` and :meth:`model_spec` depend; none by default."""
    kohya_encoders: ClassVar[Mapping[str, str]] = {}
    """Beginnings of the names of the text encoders' layers in kohya's files, by the encoders' names, such as ``lora_te1``; none
    by default."""
    undistilled: ClassVar[str] = "the model that it was distilled from"
    """Model to train on instead of one that is distilled to few steps; warnings name it."""

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        revision: str | None = None,
        variant: str | None = None,
        vae: str | None = None,
        config: str | None = None,
    ) -> None:
        check_types(ModelFamily, locals())
        super().__init__()
        self.source = ModelSource(pretrained_model_name_or_path, revision, variant, vae, config)
        self._forget()

    @property
    def pretrained_model_name_or_path(self) -> str:
        """Folder or hub id of the pipeline, as given to the constructor."""
        return self.source.path

    @property
    def vae_scale_factor(self) -> int:
        """Ratio of an image's edge in pixels to the edge of its latents."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """Number of pixels of which heights and widths of images must be multiples."""
        return self.vae_scale_factor

    @property
    def default_size(self) -> int:
        """Edge of the images that the pipeline draws by default, in pixels."""
        return int(self.denoiser_config.get("sample_size") or 64) * self.vae_scale_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of one image, such as ``(C, h, w)``.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
        """
        scale = self.vae_scale_factor
        return (int(self.vae_config["latent_channels"]), height // scale, width // scale)

    def num_tokens(self, latent_shape: Sequence[int]) -> int:
        """Number of tokens that the denoiser makes of one image's latents, for timestep shifts that depend on resolution.

        Args:
            latent_shape: Shape of the latents of one image.
        """
        return int(latent_shape[-2] * latent_shape[-1]) // int(self.denoiser_config.get("patch_size") or 1) ** 2

    @property
    def in_channels(self) -> int:
        """``in_channels`` that the denoiser's config must have: that of latents alone. Models with more are refused."""
        return int(self.vae_config["latent_channels"])

    @property
    def further_inputs(self) -> str | None:
        """Inputs that the base needs by its configs and the family does not give, as words after "it is"; such bases are refused.

        Defaults to None: there are none. :attr:`in_channels` is compared without it.
        """
        return None

    @property
    def text_settings(self) -> dict[str, Any]:
        """Settings of the family on which text embeddings depend; a cache must have been made with the same ones."""
        return {}

    @classmethod
    def native_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        """All layers of the denoiser by their names in the code that its weights were published with.

        kohya's scripts and ComfyUI use these names. By default there are none, and adapters are not written in their formats.

        Args:
            config: Config of the denoiser; for missing entries the published models' are taken.
        """
        yield from ()

    @classmethod
    def kohya_layers(cls, config: Mapping[str, Any]) -> Iterator[NativeLayer]:
        """All layers of the denoiser by the names that kohya's scripts write; defaults to :meth:`native_layers`.

        Args:
            config: Config of the denoiser; for missing entries the published models' are taken.
        """
        yield from cls.native_layers(config)

    @classmethod
    def model_spec(cls, config: Mapping[str, Any]) -> dict[str, str]:
        """What the metadata of adapter files say about the base, under keys of the model spec and of sd-scripts.

        Args:
            config: Config of the denoiser; for missing entries the published models' are taken.
        """
        return {}

    @property
    def naming_config(self) -> dict[str, Any]:
        """The entries of the denoiser's config that :attr:`naming` lists."""
        return {name: self.denoiser_config[name] for name in self.naming if name in self.denoiser_config}

    @abstractmethod
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Encode ``B`` captions to the tensors that the denoiser needs, ``(B, …)`` each, by name; masks are included."""

    def encoding_steps(self, captions: list[str]) -> EncodingSteps:
        """:meth:`encode_captions` as a generator, which pauses before a text encoder is used and yields its name.

        So one text encoder at a time has to be on the device. By default it pauses once and yields ``text``, for all of them;
        a family with several text encoders defines it, and :meth:`encode_captions` by :func:`encoded`.

        Args:
            captions: ``B`` captions.
        """
        yield "text"
        return self.encode_captions(captions)

    @abstractmethod
    def conditioning(self, text: Mapping[str, Tensor], batch: Batch, latents: Tensor) -> Conditioning:
        """Keyword arguments of the denoiser for a batch.

        Args:
            text: Result of :meth:`encode_captions`, computed now or read from a cache.
            batch: Batch with further inputs of the denoiser, such as image sizes.
            latents: Latents, ``(B, *latent_shape)``, on whose size positions depend.
        """

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction, ``(B, *latent_shape)``.

        Args:
            noisy: Noisy latents, ``(B, *latent_shape)``.
            timesteps: Timesteps in the scheduler's units, int64 or float32 ``(B,)``.
            conditioning: Result of :meth:`conditioning`.
        """
        prediction: Tensor = self.denoiser(noisy, timestep=timesteps, **conditioning).sample
        return prediction

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Normalize the VAE's latents to those that the denoiser was trained on: ``(latents - mean) * factor``.

        Mean and factor come from the VAE's config: ``latents_mean`` and ``latents_std`` of each channel if it has them, otherwise
        ``shift_factor`` and ``scaling_factor``.
        """
        mean, factor = self._latent_statistics(latents)
        return (latents - mean) * factor

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Invert :meth:`normalize_latents`."""
        mean, factor = self._latent_statistics(latents)
        return latents / factor + mean

    def posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents before normalization, in the VAE's dtype, ``(B, *latent_shape)`` each.

        Args:
            pixel_values: Images, uint8 in [0, 255] or float in [-1, 1], ``(B, 3, H, W)``.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = pixel_values.float() / 127.5 - 1
        # Not vae.dtype of diffusers, which goes through all modules of the VAE at each call.
        encoded = self.vae.encode(pixel_values.to(next(self.vae.parameters()).dtype))
        if not hasattr(encoded, "latent_dist"):  # a deterministic autoencoder
            return encoded.latent, torch.zeros_like(encoded.latent)
        return encoded.latent_dist.mean, encoded.latent_dist.std

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents, ``(B, *latent_shape)``, to images in [-1, 1], ``(B, 3, H, W)``."""
        images: Tensor = self.vae.decode(self.denormalize_latents(latents).to(self.vae.dtype), return_dict=False)[0]
        return images

    def sampling_passes(self, guidance_scale: float) -> int:
        """Passes of the denoiser over each image in one sampling step: two with classifier-free guidance, otherwise one."""
        return 2 if guidance_scale > 1 else 1

    def prompt_inputs(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """The pipeline's arguments for prompts at a guidance scale, at which 1 means no classifier-free guidance.

        ``guidance_scale`` is among them where the pipeline counts it otherwise or calls it by another name.
        """
        return text_prompts(prompts, guidance_scale)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        scheduler_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Draw one image for each prompt with the current weights; call it inside :meth:`all_parts`.

        Args:
            prompts: Prompts to draw.
            seeds: Seeds of the initial noise, one for each prompt.
            scheduler_config: Config of the scheduler to sample with; defaults to the base's own.
            **options: Further options of :func:`lit_lora.sampling.generate`; height and width default to :attr:`default_size`.
        """
        options |= {edge: options.get(edge) or self.default_size for edge in ("height", "width")}
        options["pipeline_options"] = self.drawing_options(options["height"], options["width"])
        with self._vae_in_its_own_dtype():
            pipeline = self.pipeline(scheduler_config)
            options["guided"] = self.sampling_passes(options["guidance_scale"]) > 1
            return generate(pipeline, prompts, seeds, prompt_inputs=self.prompt_inputs, **options)

    def identity(self) -> dict[str, str]:
        """Identities of the VAE (``"vae"``) and the text encoders (``"text"``), on which a cache depends.

        Options that change outputs have entries if they are set: ``"text_quantization"`` and ``"vae_tiling"``. The identity of a
        part in a local folder is a digest, see :mod:`lit_lora.families.identity`. A part without weights there has no entry.
        """
        identity = {"vae_tiling": "true"} if self.vae_tiling else {}
        identity |= self.source.identity({"vae": ["vae"], "text": list(self.base_encoders)})
        if "text" in identity:
            settings = [f"{name}={value}" for name, value in sorted(self.text_settings.items())]
            identity["text"] = ";".join([identity["text"], *settings])
            if not isinstance(self.text_quantization, Dense | None):
                identity["text_quantization"] = repr(self.text_quantization)
        return identity

    def base_identity(self) -> dict[str, str]:
        """Identities of the denoiser (``"denoiser"``) and of the parts in :meth:`identity`."""
        return self.source.identity({"denoiser": [self.denoiser_name]}) | self.identity()

    def encode(self, batch: Batch, draws: Draws) -> tuple[Tensor, Conditioning]:
        """Normalized latents of a batch, float32 ``(B, *latent_shape)``, and the denoiser's conditioning.

        Frozen encoders compute in the dtype of their weights, without gradients. Text encoders in which something is trained
        compute as the caller's context says.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            latents = self.latents(batch, draws)
            text = None if self.trained_encoders else self._text(batch)
        text = self._text(batch) if text is None else text
        return latents, self.conditioning(text, batch, latents)

    def _text(self, batch: Batch) -> dict[str, Tensor]:
        """Text embeddings of a batch in the base's dtype, computed now or read from a cache."""
        text = batch["text_embeddings"] if "text_embeddings" in batch else self.encode_captions(batch["caption"])
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in text.items()}

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Normalized latents drawn from the VAE's posterior, float32 ``(B, *latent_shape)``.

        Args:
            batch: Batch with images, or with the posterior's mean and standard deviation.
            draws: Random numbers of the batch.
        """
        if "latents_mean" in batch:
            mean, std = batch["latents_mean"], batch["latents_std"]
        else:
            mean, std = self.posterior(batch["pixel_values"])
        return self.normalize_latents(mean.float() + std.float() * draws.normal("posterior", mean.shape[1:]))

    def tokenize(self, tokenizer: Any, captions: list[str], max_length: int | None = None) -> Tensor:
        """Token ids of captions, int64 ``(B, max_length)``: see :meth:`masked_tokens`."""
        return self.masked_tokens(tokenizer, captions, max_length)[0]

    def masked_tokens(
        self, tokenizer: Any, texts: list[str], max_length: int | None = None, captions: list[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids of texts, padded or truncated, and 1 for tokens, 0 for padding, on the device of the weights.

        It warns of captions that are truncated, once.

        Args:
            tokenizer: One of :attr:`encoders`.
            texts: ``B`` captions, or texts with them.
            max_length: Number of tokens; defaults to the tokenizer's own maximum.
            captions: The captions in these texts, for the warning. Defaults to None: the texts are the captions.

        Returns:
            Ids and mask, int64 ``(B, max_length)`` each.
        """
        captions = captions or texts
        if self.new_tokens:  # those of several vectors become several tokens, as in the pipeline
            texts = TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        encoded = tokenizer(texts, max_length=max_length or tokenizer.model_max_length, **options)
        tell_cut_captions(tokenizer, texts, encoded.attention_mask, captions, self.encoders)
        if self.new_tokens and torch.is_grad_enabled() and tokenizer is self.encoders["tokenizer"]:
            self.token_uses.count(tokenizer, captions, encoded.input_ids, self.new_tokens)
        return to_device(encoded.input_ids, self.device), to_device(encoded.attention_mask, self.device)

    @contextmanager
    def _vae_in_its_own_dtype(self) -> Iterator[None]:
        """A context in which the VAE decodes in its own dtype, without autocast: some decoders overflow in half precision."""
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
        """Whether the name or the configs of the model show that it is distilled to few steps."""
        scheduler = self.scheduler_config
        few_steps = scheduler.get("_class_name") in ("LCMScheduler", "TCDScheduler")
        # The scheduler settings of SD-Turbo and SDXL-Turbo.
        euler = scheduler.get("_class_name", "").startswith("Euler") and not scheduler.get("rescale_betas_zero_snr")
        turbo = euler and scheduler.get("timestep_spacing") == "trailing"
        guidance_embedded = self.denoiser_config.get("time_cond_proj_dim") is not None
        return few_steps or turbo or guidance_embedded or bool(_DISTILLED.search(Path(self.source.path).name))

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean to subtract from the VAE's latents, and factor to multiply the difference with."""
        config = self.vae_config
        scale = float(config.get("scaling_factor") or 1.0)
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return float(config.get("shift_factor") or 0.0), scale
        shape = (1, -1, *[1] * (latents.ndim - 2))
        statistics = torch.tensor([config["latents_mean"], config["latents_std"]], dtype=latents.dtype)
        mean, std = to_device(statistics.view(2, *shape), latents.device)
        return mean, scale / std


def encoded(steps: EncodingSteps) -> dict[str, Tensor]:
    """The result of :meth:`ModelFamily.encoding_steps`, with all text encoders on the device."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: dict[str, Tensor] = end.value
            return result
