"""The parts of a diffusion pipeline in memory: loading, leaving out, loading for a while, assembling a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_lora.adapters import AdaptedParts, inject, same_adapter
from lit_lora.distributed.node import Node
from lit_lora.errors import UserError
from lit_lora.families.loading import PartLoader
from lit_lora.families.new_tokens import TokenStart, add_tokens, new_rows
from lit_lora.families.other_vae import check_other_vae
from lit_lora.families.pipeline_kind import PipelineKind
from lit_lora.families.source import ModelSource
from lit_lora.families.token_uses import TokenUses
from lit_lora.quantization import Dense, Quantization
from lit_lora.quantization.load import Weights
from lit_lora.quantization.weight_change import Changes

PARTS = ("vae", "text", "denoiser")
"""Parts that can be left out when a family is loaded; ``text`` is all tokenizers and text encoders."""


class PipelineParts(PipelineKind):
    """The denoiser, VAE and encoders of one diffusers pipeline, which class attributes name."""

    denoiser_class: ClassVar[type[nn.Module]]
    older_denoisers: ClassVar[tuple[str, ...]] = ()
    """Class names in configs of older files that mean :attr:`denoiser_class`; none by default."""
    denoiser_name: ClassVar[str]
    """Name of the denoiser in the pipeline: ``unet`` or ``transformer``."""
    vae_class: ClassVar[type[nn.Module]] = AutoencoderKL
    block_classes: ClassVar[tuple[str, ...]]
    """Class names of the denoiser's repeated blocks, the units of sharding, compiling and offloading."""
    default_targets: ClassVar[tuple[str, ...]]
    """Layers to adapt if the adapter's config names none."""
    adaptable_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that can be trained, for which the pipeline's LoRA files have names; none by default."""
    default_text_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Layers of the text encoders to adapt if their config names none; defaults to CLIP's attention."""
    token_encoders: ClassVar[Mapping[str, str]] = {}
    """Text encoders that learn new tokens, all of the pipeline, each with the key of its embeddings in files of textual
    inversion, "" where the token is the key. None by default, for pipelines that do not load such files."""
    always_dense: ClassVar[tuple[str, ...]] = ()
    """Glob patterns of the denoiser's layers that are never quantized; none by default."""
    default_vae_dtype: ClassVar[torch.dtype | None] = None
    """dtype of the VAE, for families whose VAE overflows in half precision; defaults to None, the base's dtype."""

    source: ModelSource
    vae_slicing: bool = False
    vae_tiling: bool = False
    computes_on: torch.device | None = None
    """Device of the encoders' inputs, for parts that are there only while they compute; defaults to that of the weights."""
    text_quantization: Quantization | None = None
    """Quantization with which text encoders are loaded; defaults to none."""
    scheduler_config: dict[str, Any]
    vae_config: dict[str, Any]
    denoiser_config: dict[str, Any]
    """Configs of the parts, complete with defaults; :meth:`read_configs` reads them, without any weights."""
    vae: Any
    denoiser: Any
    encoders: dict[str, Any]
    """Loaded tokenizers and text encoders by name."""
    trained_encoders: tuple[str, ...]
    """Names of the loaded text encoders in which something is trained."""
    new_tokens: dict[str, int]
    """Number of vectors of each new token."""
    token_uses: TokenUses
    """Counts of the captions with each new token that were trained on."""

    def read_configs(self) -> None:
        """Read the configs of scheduler, VAE and denoiser, unless they were read before.

        Raises:
            UserError: If a part is missing, its config cannot be read, or another VAE has other latents than the pipeline's.
        """
        if not hasattr(self, "denoiser_config"):
            self.scheduler_config = self.source.config_of("scheduler")
            self.vae_config = self.source.config_of("vae", self.vae_class)
            if self.source.vae is not None:
                check_other_vae(self.source, self.vae_class, self.vae_config)
            self.denoiser_config = self.source.config_of(self.denoiser_name, self.denoiser_class)

    def load(
        self,
        dtype: torch.dtype,
        vae_dtype: torch.dtype | None = None,
        without: Collection[str] = (),
        quantization: Quantization | None = None,
        weights: bool = True,
        node: Node | None = None,
        changes: Mapping[str, Changes] | None = None,
    ) -> None:
        """Load the parts, frozen; parts that are loaded already do not change.

        Args:
            dtype: dtype of the denoiser and the text encoders.
            vae_dtype: dtype of the VAE; defaults to :attr:`default_vae_dtype`, or to ``dtype`` if that is None.
            without: Parts to leave out, of :data:`PARTS`; defaults to none. :meth:`all_parts` loads them for a while.
            quantization: Quantization of the denoiser's weights; defaults to none, so that they are stored in ``dtype``.
            weights: Whether to load weights; False builds the parts from their configs alone, with meaningless values.
                Defaults to True.
            node: Processes of this machine, of which one reads the files; defaults to this process alone.
            changes: Changes of weights by the name of the part in the pipeline, before they are quantized; defaults to none.

        Raises:
            UserError: If a part is missing or cannot be read, or lacks weights to change.
        """
        self.dtype = dtype
        self.vae_dtype = vae_dtype or self.default_vae_dtype or dtype
        self.loader = PartLoader(
            self.source,
            dtype,
            quantization or Dense(),
            self.always_dense,
            weights,
            node or Node(),
            changes or {},
            self.text_quantization,
        )
        self.read_configs()
        for part in self._missing():
            if part not in without:
                self._load_part(part)

    def load_adapted(
        self, config: PeftConfig, shard: Callable[[nn.Module], None], start: Callable[[PeftModel], None] | None = None
    ) -> None:
        """Load the denoiser with its adapter, block by block, after :meth:`load` without the denoiser.

        The result is that of :meth:`load` and :meth:`add_adapter`, with the first process's values of the adapter.

        Args:
            config: Config of the adapter.
            shard: Function that shards a part: see :meth:`~lit_lora.families.loading.PartLoader.sharded_denoiser`.
            start: Function that sets the adapter's values; defaults to the method's own initial values.

        Raises:
            UserError: If the denoiser cannot be read or adapted, or the adapter's method needs the base's weights to initialize
                the adapter.
        """

        def adapt(denoiser: nn.Module) -> nn.Module:
            return self._adapted("denoiser", denoiser, config, start)

        self.denoiser = self.loader.sharded_denoiser(
            self.denoiser_name, self.denoiser_class, self.block_classes, adapt, config, shard
        )

    def add_adapter(self, config: PeftConfig, start: Callable[[PeftModel], None] | None = None) -> None:
        """Put the adapter into the denoiser; :attr:`denoiser` becomes a :class:`peft.PeftModel`.

        Args:
            config: Config of the adapter.
            start: Function that sets the adapter's values; defaults to the method's own initial values.

        Raises:
            UserError: If the config does not fit the denoiser: see :func:`lit_lora.adapters.inject`.
        """
        self.denoiser = self._adapted("denoiser", self.denoiser, config, start)

    def add_text_adapter(self, name: str, config: PeftConfig, start: Callable[[PeftModel], None] | None = None) -> None:
        """Put an adapter into a loaded text encoder, which becomes a :class:`peft.PeftModel`.

        Args:
            name: One of :attr:`adaptable_encoders`.
            config: Config of the adapter.
            start: Function that sets the adapter's values; defaults to the method's own initial values.

        Raises:
            UserError: If the config does not fit: see :func:`lit_lora.adapters.inject`.
        """
        self.encoders[name] = adapted = self._adapted(name, self.encoders[name], config, start)
        self.add_module(name, adapted)
        self._note_trained(name)

    def add_new_tokens(self, starts: Mapping[str, TokenStart]) -> None:
        """Give all tokenizers and text encoders new tokens, whose embeddings are trained.

        Args:
            starts: First values of each new token's embeddings: words, a number of random vectors, or tensors by encoder.

        Raises:
            UserError: If a name is a token already, words have no token, or tensors do not fit.
        """
        for name in self.token_encoders:
            own = {token: start[name] if isinstance(start, Mapping) else start for token, start in starts.items()}
            tokenizer = self.encoders[name.replace("text_encoder", "tokenizer")]
            added = add_tokens(tokenizer, base_model(self.encoders[name]), own)
            assert self.new_tokens in ({}, added), "the tokenizers of a pipeline divide words in the same way"
            self.new_tokens = added
            self._note_trained(name)

    def shard_trained_encoders(self, shard: Callable[[nn.Module], None]) -> None:
        """Shard the text encoders in which something is trained, with the first process's values of what is trained.

        Args:
            shard: Function that shards a module, of a strategy that shards weights.
        """
        for name in self.trained_encoders:
            same_adapter(self.encoders[name])
            shard(base_model(self.encoders[name]))

    def new_token_rows(self) -> dict[str, dict[str, Tensor]]:
        """Full embeddings of the new tokens on the CPU, ``(n, D)``, by token and text encoder.

        A collective call where the strategy shards weights.
        """
        rows: dict[str, dict[str, Tensor]] = {token: {} for token in self.new_tokens}
        for name in self.token_encoders if self.new_tokens else ():
            for token, values in new_rows(base_model(self.encoders[name]), self.new_tokens).items():
                rows[token][name] = values
        return rows

    def unread_layers(self, name: str, part: Any) -> list[nn.Module]:
        """Layers whose outputs nobody reads, so that they get no gradient and their adapter stays as it is; by default none.

        Args:
            name: ``denoiser``, or one of :attr:`adaptable_encoders`.
            part: The denoiser or the text encoder, without PEFT's wrapper.
        """
        return []

    @property
    def adapted(self) -> AdaptedParts:
        """The loaded parts that have an adapter."""
        parts = {"denoiser": self.denoiser, **self.encoders}.items()
        return AdaptedParts({name: part for name, part in parts if isinstance(part, PeftModel)})

    @contextmanager
    def all_parts(self) -> Iterator[None]:
        """A context in which all parts are loaded; parts that :meth:`load` left out are freed at its end.

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
        """Make the VAE process one image at a time (slicing), or one tile of a large image at a time (tiling)."""
        self.vae_slicing, self.vae_tiling = slicing, tiling
        if self.vae is not None:
            (self.vae.enable_slicing if slicing else self.vae.disable_slicing)()
            (self.vae.enable_tiling if tiling else self.vae.disable_tiling)()

    @property
    def device(self) -> torch.device:
        """Device on which the denoiser computes; without it, the one on which the encoders do."""
        if self.computes_on is not None:
            return self.computes_on
        model = self if self.denoiser is None else self.denoiser
        parameter = next(model.parameters())
        if isinstance(parameter, DTensor):  # a shard may be in host memory
            kind = parameter.device_mesh.device_type
            return torch.device(kind if kind == "cpu" else torch.get_device_module(kind).current_device())
        return parameter.device

    def encoding_models(self) -> list[nn.Module]:
        """Those of the VAE and the text encoders that are loaded."""
        return [model for name, model in self.named_children() if name != "denoiser"]

    def frozen_encoding_models(self) -> list[nn.Module]:
        """Those of :meth:`encoding_models` in which nothing is trained."""
        kept = {"denoiser", *self.trained_encoders}
        return [model for name, model in self.named_children() if name not in kept]

    def pipeline(self, scheduler_config: Mapping[str, Any] | None = None) -> DiffusionPipeline:
        """A diffusers pipeline that shares the loaded weights, adapter included; call it inside :meth:`all_parts`.

        Args:
            scheduler_config: Config of the scheduler to sample with; defaults to the base's own.
        """
        config = scheduler_config or self.scheduler_config
        scheduler_class = getattr(diffusers, config["_class_name"])
        pipeline = self.base_pipeline(
            vae=self.vae,
            scheduler=scheduler_class.from_config(config),
            **{self.denoiser_name: base_model(self.denoiser)},
            **(dict.fromkeys(self.optional_encoders) | {name: base_model(one) for name, one in self.encoders.items()}),
            **self.base_options,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def drawing_options(self, height: int, width: int) -> dict[str, Any]:
        """Further arguments with which the pipeline draws images of a height and width in pixels; none by default."""
        return {}

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the denoiser and of all adapters; the encoders' own layers stay in evaluation mode."""
        super().train(mode)
        for model in self.encoding_models():
            model.eval()
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.train(mode)
        return self

    def unloaded(self) -> Self:
        """A copy with the same settings and nothing loaded or read; this object does not change."""
        fresh = copy.copy(self)
        fresh._modules = {}
        fresh._forget()
        for name in ("scheduler_config", "vae_config", "denoiser_config"):
            fresh.__dict__.pop(name, None)
        return fresh

    def unquantized_weights(self) -> Weights:
        """The weights in the denoiser's files, after :meth:`load`; each process reads for itself.

        Raises:
            UserError: If the files are missing or do not hold the denoiser's weights.
        """
        return self.loader.weight_files(self.denoiser_name, self.denoiser_class, Node())

    def _adapted(
        self, name: str, part: nn.Module, config: PeftConfig, start: Callable[[PeftModel], None] | None
    ) -> PeftModel:
        adapted = inject(part, config, self.default_targets if name == "denoiser" else self.default_text_targets)
        if start is not None and self.loader.weights:
            start(adapted)
        for layer in self.unread_layers(name, base_model(adapted)):
            layer.requires_grad_(False)
        return adapted

    def _note_trained(self, name: str) -> None:
        self.trained_encoders = tuple(dict.fromkeys([*self.trained_encoders, name]))

    def _missing(self) -> list[str]:
        """Those of :data:`PARTS` that are not loaded."""
        loaded = {"vae": self.vae, "text": self.encoders, "denoiser": self.denoiser}
        return [part for part in PARTS if not loaded[part]]

    def _load_part(self, part: str, device: torch.device | None = None) -> None:
        def placed(model: Any) -> Any:
            return model if device is None or not isinstance(model, nn.Module) else model.to(device)

        if part == "text":
            classes = {name: kind for name, kind in self.base_encoders.items() if not self.skips(name)}
            self.loader.check_encoders(classes)
            self.encoders = {name: placed(self.loader.encoder(name, kind)) for name, kind in classes.items()}
            if lacking := [name for name in self.loader.changes if name != self.denoiser_name and name not in classes]:
                change = next(iter(self.loader.changes[lacking[0]].values()))
                raise UserError(
                    f"{change.source} changes {lacking[0]}, which {self.source.path} does not have; set drop_text_encoders of "
                    f"base_adapters to true to use it without that part"
                )
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
        self.trained_encoders = ()
        self.new_tokens = {}
        self.token_uses = TokenUses()


def base_model(part: Any) -> Any:
    """A part of a pipeline with its adapter's layers, but without PEFT's wrapper; other parts as they are."""
    return part.get_base_model() if isinstance(part, PeftModel) else part
