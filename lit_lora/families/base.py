"""What a model family is: the parts of a diffusion pipeline and how one training step uses them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_lora.adapters import (
    ADAPTER_NAME,
    adapter_state,
    check_block_by_block,
    complete_adapter,
    inject,
    is_lora,
    plain_config,
    same_adapter,
    save_peft_files,
    sort_metadata,
)
from lit_lora.distributed.node import Node
from lit_lora.draws import Draws
from lit_lora.embedded import resolve
from lit_lora.errors import UserError
from lit_lora.families.identity import parts_identity
from lit_lora.quantization import Dense, Quantization
from lit_lora.quantization.load import Weights, load_model, load_part, shape_model, shape_part

Batch = Mapping[str, Any]
"""What a datamodule gives, ``B`` samples:

| key | value |
|---|---|
| ``pixel_values`` | uint8 in [0, 255] or float in [-1, 1], ``(B, 3, H, W)`` |
| ``caption`` | list of ``B`` strings |
| ``original_size`` | int64 ``(B, 2)``: height, width before resizing (optional) |
| ``crop_top_left`` | int64 ``(B, 2)``: top, left of the crop in resized pixels (optional) |
| ``target_size`` | int64 ``(B, 2)``: height, width of the pictures to train on, ``H, W`` (optional) |
| ``weight`` | float32 ``(B,)``: 0 for a slot that must not count (optional) |
| ``slot`` | list of ``B`` ints: number of the sample's place in the whole run (optional) |
| ``key`` | list of ``B`` strings, the samples' names (optional) |

From a cache ``latents_mean`` and ``latents_std``, float ``(B, C, h, w)``, the VAE's posterior, stand in for
``pixel_values``, and ``target_size`` is there. Where text is cached too, ``text_embeddings`` is a dict of tensors
``(B, …)``, what :meth:`ModelFamily.encode_captions` gives, and ``empty_text_embeddings`` the same for one empty caption,
without the batch dimension.
"""

Conditioning = dict[str, Any]
"""Keyword arguments of the denoiser's ``forward``."""

PARTS = ("vae", "text", "denoiser")
"""What can be left out when a family is loaded: ``text`` is all tokenizers and text encoders."""


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
    always_dense: ClassVar[tuple[str, ...]] = ()
    """Glob patterns of the denoiser's layers that a quantization leaves in the base's dtype: few weights that much depends on."""
    default_vae_dtype: ClassVar[torch.dtype | None] = None
    """Of the VAE where its weights overflow in others; otherwise it has the base's."""
    pipeline_options: ClassVar[dict[str, Any]] = {}
    """Further arguments of the pipeline's constructor."""

    scheduler_config: dict[str, Any]
    vae_config: Mapping[str, Any]
    """The VAE's config with its defaults filled in; it is there without the VAE too."""

    def __init__(
        self, pretrained_model_name_or_path: str, revision: str | None = None, variant: str | None = None
    ) -> None:
        super().__init__()
        self.pretrained_model_name_or_path = pretrained_model_name_or_path
        self.revision = revision
        self.variant = variant
        self.vae: Any = None
        self.denoiser: Any = None
        self.encoders: dict[str, Any] = {}
        self.vae_slicing = self.vae_tiling = False

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
            dtype: Of the denoiser and the text encoders.
            vae_dtype: Of the VAE; the family's, or ``dtype``, if not given.
            without: Parts to leave out, of :data:`PARTS`; :meth:`all_parts` brings them in for a while.
            quantization: How the weights of the denoiser's layers are stored; in ``dtype`` if not given.
            weights: Otherwise the parts are made from their configs, and their values mean nothing.
            node: Who reads the weights' files where several processes load at the same time; each by itself if not given.

        Raises:
            UserError: A part is missing or cannot be read.
        """
        self.dtype = dtype
        self.vae_dtype = vae_dtype or self.default_vae_dtype or dtype
        self.quantization = quantization or Dense()
        self._weights = weights
        if not hasattr(self, "scheduler_config"):
            self.scheduler_config = dict(self._part("scheduler", DDPMScheduler.load_config))
            self.vae_config = self._part("vae", _complete_vae_config)
        for name in self._missing():
            if name not in without:
                self._load_part(name, node=node)

    def load_adapted(self, config: PeftConfig, shard: Callable[[nn.Module], None], node: Node | None = None) -> None:
        """Load the denoiser with the adapter in it, without ever having all of its weights: after :meth:`load` without it.

        It gives what :meth:`load` and :meth:`add_adapter` give, the adapter with the first process's values.

        Args:
            config: Of the adapter.
            shard: Called with each part of the denoiser once its weights are there, blocks and large layers, at last with the
                denoiser; may take the weights away.
            node: As for :meth:`load`.

        Raises:
            UserError: As for these; and the adapter's beginning depends on the base in a way that is not known here.
        """
        check_block_by_block(config)

        def open_files(source: str, subfolder: str, **options: Any) -> Weights:
            kind, skipped = self.denoiser_class, self.always_dense
            arguments = (kind, source, subfolder, self.quantization, self.dtype)
            return Weights(*arguments, always_skipped=skipped, variant=self.variant, node=node, **options)

        weights: Weights = self._part(self.denoiser_name, open_files)
        parts = weights.in_parts(self.block_classes)
        weights.show_nothing()
        self.denoiser = weights.model.eval()
        self.add_adapter(config)
        same_adapter(self.denoiser)
        together = _read_by_others(self.denoiser)

        def read(source: str, subfolder: str, *, names: list[str], **options: Any) -> None:
            for name in names:
                weights.put(name)

        for module, names in parts:
            self._part(self.denoiser_name, read, names=names)
            if module not in together:
                complete_adapter(module, config)
                shard(module)

    @contextmanager
    def all_parts(self) -> Iterator[None]:
        """Inside the block every part is there; those that were left out of :meth:`load` are freed at its end.

        Raises:
            UserError: A part is missing or cannot be read.
        """
        device = self.device
        missing = self._missing()
        try:
            for name in missing:
                self._load_part(name, device)
            yield
        finally:
            for name in missing:
                self._free_part(name)

    def split_vae(self, slicing: bool, tiling: bool) -> None:
        """Have the VAE work on one picture at a time (slicing), or on one tile of a large one (tiling): diffusers' names."""
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

    @property
    def downscale(self) -> int:
        """Edge of a picture by edge of its latents."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    def identity(self) -> dict[str, str]:
        """What latents (``"vae"``) and embeddings (``"text"``) of a cache depend on, as texts to compare.

        A local folder is known by its contents, wherever it lies: see :mod:`lit_lora.families.identity`. A part whose
        folder has no weights is not mentioned.
        """
        parts = {"vae": ["vae"], "text": list(self.encoder_classes)}
        source = Path(resolve(self.pretrained_model_name_or_path))
        if source.is_dir():
            return parts_identity(source, parts, self.variant)
        name = f"{source}@{self.revision or 'main'}"
        return dict.fromkeys(parts, f"{name}:{self.variant}" if self.variant else name)

    def add_adapter(self, config: PeftConfig) -> None:
        """Put the adapter into the denoiser; :attr:`denoiser` becomes a :class:`peft.PeftModel`.

        Raises:
            UserError: See :func:`lit_lora.adapters.inject`.
        """
        self.denoiser = inject(self.denoiser, config, self.default_targets)

    def encode(self, batch: Batch, draws: Draws) -> tuple[Tensor, Conditioning]:
        """Latents, float32 ``(B, C, h, w)``, and the denoiser's conditioning; without gradients."""
        text = batch["text_embeddings"] if "text_embeddings" in batch else self.encode_captions(batch["caption"])
        text = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in text.items()}
        return self.latents(batch, draws), self.conditioning(text, batch)

    @abstractmethod
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Everything that the denoiser wants to know of ``B`` captions, by name: ``(B, …)`` each."""

    @abstractmethod
    def conditioning(self, text: Mapping[str, Tensor], batch: Batch) -> Conditioning:
        """The denoiser's conditioning.

        Args:
            text: What :meth:`encode_captions` gave, now or when the cache was made.
            batch: For what else the denoiser wants to know.
        """

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction, ``(B, C, h, w)``.

        Args:
            noisy: ``(B, C, h, w)``.
            timesteps: int64 ``(B,)``.
            conditioning: What :meth:`encode` gave.
        """
        prediction: Tensor = self.denoiser(noisy, timesteps, **conditioning).sample
        return prediction

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Scaled latents, drawn from the VAE's posterior: float32 ``(B, C, h, w)``.

        Args:
            batch: With the posterior, or with pictures.
            draws: Gives the posterior's noise.
        """
        if "latents_mean" in batch:
            mean, std = batch["latents_mean"], batch["latents_std"]
        else:
            mean, std = self.posterior(batch["pixel_values"])
        latents = mean.float() + std.float() * draws.normal("posterior", mean.shape[1:])
        shift = self.vae_config.get("shift_factor") or 0.0
        return (latents - shift) * float(self.vae_config["scaling_factor"])

    def posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents before they are scaled, in the VAE's dtype, ``(B, C, h, w)`` each.

        Args:
            pixel_values: uint8 in [0, 255] or float in [-1, 1], ``(B, 3, H, W)``.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = pixel_values.float() / 127.5 - 1
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline over these very weights, adapter included, with the base's own scheduler.

        It needs every part: see :meth:`all_parts`.
        """
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

    def save_adapter(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the adapter as PEFT's files and, where diffusers knows the method, as diffusers' LoRA file.

        Args:
            folder: An existing folder.
            state: What :func:`~lit_lora.adapters.adapter_state` gave; called here if not given.
        """
        config = self.denoiser.peft_config[ADAPTER_NAME]
        plain = plain_config(config) | {"base_model_name_or_path": self.pretrained_model_name_or_path}
        state = adapter_state(self.denoiser) if state is None else state
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
            sort_metadata(folder / LORA_WEIGHT_NAME_SAFE)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the denoiser; the frozen encoders stay in evaluation mode."""
        super().train(mode)
        for model in self.encoding_models():
            model.eval()
        return self

    def tokenize(self, tokenizer: Any, captions: list[str]) -> Tensor:
        """int64 ``(B, tokens)``, padded and cut to the tokenizer's length, on the weights' device."""
        encoded = tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        return ids.to(self.device)

    def _missing(self) -> list[str]:
        """Those of :data:`PARTS` that are not loaded."""
        loaded = {"vae": self.vae, "text": self.encoders, "denoiser": self.denoiser}
        return [name for name in PARTS if not loaded[name]]

    def _load_part(self, part: str, device: torch.device | None = None, node: Node | None = None) -> None:
        node = node or Node()
        if part == "text":
            self.encoders = {name: self._model(name, kind, device, node) for name, kind in self.encoder_classes.items()}
            for name, encoder in self.encoders.items():
                if isinstance(encoder, nn.Module):
                    self.add_module(name, encoder)
        elif part == "vae":
            self.vae = self._model("vae", AutoencoderKL, device, node, self.vae_dtype)
            self.split_vae(self.vae_slicing, self.vae_tiling)
        else:
            denoiser = self._part(self.denoiser_name, partial(self._denoiser, node))
            self.denoiser = denoiser if device is None else denoiser.to(device)

    def _free_part(self, part: str) -> None:
        if part == "text":
            for name in self.encoders:
                self._modules.pop(name, None)
            self.encoders = {}
        else:
            setattr(self, part, None)

    def _model(
        self, name: str, kind: Any, device: torch.device | None, node: Node, dtype: torch.dtype | None = None
    ) -> Any:
        """A model, frozen, in evaluation mode; or a tokenizer."""
        if not issubclass(kind, nn.Module):
            return self._part(name, kind.from_pretrained)
        dtype = dtype or self.dtype

        def load(source: str, subfolder: str, **options: Any) -> nn.Module:
            if not self._weights:
                return shape_part(kind, source, subfolder, dtype, **options)
            variant = {"variant": self.variant} if self.variant else {}
            return load_part(kind, source, subfolder, dtype, node, **options, **variant)

        model = self._part(name, load)
        return model if device is None else model.to(device)

    def _denoiser(self, node: Node, source: str, subfolder: str, revision: str | None = None) -> nn.Module:
        arguments = (self.denoiser_class, source, subfolder, self.quantization, self.dtype)
        if not self._weights:
            return shape_model(*arguments, always_skipped=self.always_dense, revision=revision)
        return load_model(
            *arguments, always_skipped=self.always_dense, revision=revision, variant=self.variant, node=node
        )

    def _part(self, name: str, from_pretrained: Any, **options: Any) -> Any:
        """One part of the pipeline, or a :class:`UserError` that says which part is missing where."""
        source = resolve(self.pretrained_model_name_or_path)
        if Path(source).is_dir() and not (Path(source) / name).is_dir():
            raise UserError(
                f"{source} has no folder {name!r}, so it is no complete {self.pipeline_class.__name__}; it holds "
                f"{', '.join(sorted(p.name for p in Path(source).iterdir())) or 'nothing'}. Give a folder that diffusers' "
                f"save_pretrained wrote, or a hub id."
            )
        if self.revision:
            options["revision"] = self.revision
        try:
            return from_pretrained(source, subfolder=name, **options)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise UserError(f"cannot load {name!r} of {source!r}: {error}") from error


def target_size(batch: Batch) -> Tensor:
    """Height and width of the pictures to train on, int64 ``(B, 2)``."""
    if "target_size" in batch:
        size: Tensor = batch["target_size"]
        return size
    pixel_values = batch["pixel_values"]
    return torch.tensor([pixel_values.shape[-2:]], device=pixel_values.device).expand(len(pixel_values), 2)


def _read_by_others(denoiser: nn.Module) -> set[nn.Module]:
    """Modules whose weights are read without calling them: by adapters, and to copy them."""
    read: set[nn.Module] = set()
    for layer in denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            read.add(layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            read.update(layer.modules())
            read.discard(layer)
    return read


def _complete_vae_config(source: str, **options: Any) -> Mapping[str, Any]:
    """The config as the VAE would have it: older files leave out what is now a default, as the scaling factor."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(source, **options))
    config: Mapping[str, Any] = vae.config
    return config
