"""The parts of a diffusion pipeline in memory: loaded, left out, brought in for a while, put together again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from peft import PeftConfig, PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from lit_lora.adapters import inject
from lit_lora.distributed.node import Node
from lit_lora.families.loading import PartLoader
from lit_lora.families.source import ModelSource
from lit_lora.quantization import Dense, Quantization

PARTS = ("vae", "text", "denoiser")
"""What can be left out when a family is loaded: ``text`` is all tokenizers and text encoders."""


class PipelineParts(nn.Module):
    """The denoiser, VAE and encoders of one diffusers pipeline, which class attributes name.

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
    always_dense: ClassVar[tuple[str, ...]] = ()
    """Glob patterns of the denoiser's layers that stay in the base's dtype under every quantization."""
    default_vae_dtype: ClassVar[torch.dtype | None] = None
    """dtype of the VAE; defaults to the base's dtype unless the VAE overflows in that."""
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

    def skips(self, encoder: str) -> bool:
        """Whether one of :attr:`encoder_classes` is not loaded: by default if the pipeline may lack it, and does."""
        return encoder in self.optional_encoders and self.source.lacks(encoder)

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

    def unloaded(self) -> Self:
        """A copy with the same settings, as it was before anything was loaded or read; this one stays as it is."""
        fresh = copy.copy(self)
        fresh._modules = {}
        fresh._forget()
        for name in ("scheduler_config", "vae_config", "denoiser_config"):
            fresh.__dict__.pop(name, None)
        return fresh

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

    def _forget(self) -> None:
        self.vae = self.denoiser = None
        self.encoders = {}
