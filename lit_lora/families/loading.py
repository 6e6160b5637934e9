"""Loads the parts of a pipeline as models in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from lit_lora.adapters import check_block_by_block, complete_adapter, same_adapter
from lit_lora.distributed.node import Node
from lit_lora.families.source import ModelSource
from lit_lora.quantization import Dense, Quantization
from lit_lora.quantization.encoders import load_encoder, shape_encoder
from lit_lora.quantization.frozen_layer import freezable
from lit_lora.quantization.load import Weights, load_model, load_part, shape_model, shape_part
from lit_lora.quantization.weight_change import Changes


@dataclass(frozen=True)
class PartLoader:
    """Loads the parts of one pipeline, frozen and in evaluation mode.

    Args:
        source: Source of the pipeline.
        dtype: dtype of the denoiser and the text encoders.
        quantization: Quantization of the denoiser's weights; defaults to none, so that they are stored in ``dtype``.
        always_dense: Glob patterns of the denoiser's layers that stay in ``dtype``; defaults to none.
        weights: Whether to load weights; False builds models from their configs alone, with meaningless values. Defaults to
            True.
        node: Processes of this machine, of which one reads the files; defaults to this process alone.
        changes: Changes of weights by the name of the part, before they are quantized; defaults to none.
        text_quantization: Quantization of the text encoders' weights; defaults to none.
    """

    source: ModelSource
    dtype: torch.dtype
    quantization: Quantization = field(default_factory=Dense)
    always_dense: tuple[str, ...] = ()
    weights: bool = True
    node: Node = field(default_factory=Node)
    changes: Mapping[str, Changes] = field(default_factory=dict)
    text_quantization: Quantization | None = None

    def encoder(self, name: str, kind: type[Any], dtype: torch.dtype | None = None) -> Any:
        """Load a VAE, text encoder or tokenizer.

        Args:
            name: Name of the part in the pipeline.
            kind: Class of the part.
            dtype: dtype of its weights; defaults to the loader's dtype.

        Raises:
            UserError: If the part is missing or cannot be read.
        """
        if not issubclass(kind, nn.Module):
            return self.source.load(name, kind.from_pretrained)
        dtype = dtype or self.dtype
        quantization = None if name == "vae" else self.text_quantization

        def load(location: str, subfolder: str, **options: Any) -> nn.Module:
            if not self.weights:
                return shape_encoder(shape_part(kind, location, subfolder, dtype, **options), quantization, name)
            file, read = self.source.file_of(name), None
            if file is not None and file.holds(kind):
                read = file.load
            elif variant := self.source.variant_of(name):
                options["variant"] = variant
            changes = self.changes.get(name, {})
            make = partial(load_encoder, quantization=quantization, name=name, changes=changes, load=read)
            return load_part(kind, location, subfolder, dtype, self.node, make, quantization, **options)

        return self.source.load(name, load)

    def check_encoders(self, classes: Mapping[str, type[Any]]) -> None:
        """Check that each pattern of ``text_quantization.skip`` matches a layer, before any weights are read.

        Args:
            classes: Classes of the text encoders and tokenizers by name.

        Raises:
            UserError: If a pattern matches none, or an encoder's config cannot be read.
        """
        if self.text_quantization is None or not self.text_quantization.skip:
            return
        models = {name: kind for name, kind in classes.items() if issubclass(kind, nn.Module)}
        with torch.device("meta"):
            shapes = {name: self.source.load(name, partial(_shape, kind, self.dtype)) for name, kind in models.items()}
        self.text_quantization.check_skipped(
            [f"{name}.{layer}" for name, model in shapes.items() for layer in freezable(model)]
        )

    def denoiser(self, name: str, kind: type[nn.Module]) -> Any:
        """Load the denoiser with quantized weights.

        Args:
            name: Name of the denoiser in the pipeline.
            kind: Class of the denoiser.

        Raises:
            UserError: If the denoiser is missing or cannot be read.
        """

        def load(location: str, subfolder: str, **options: Any) -> nn.Module:
            arguments = (kind, location, subfolder, self.quantization, self.dtype)
            if not self.weights:
                return shape_model(*arguments, always_skipped=self.always_dense, **options)
            return load_model(*arguments, always_skipped=self.always_dense, **self._files(name, self.node), **options)

        return self.source.load(name, load)

    def weight_files(self, name: str, kind: type[nn.Module], node: Node) -> Weights:
        """The weights in the denoiser's files, none of which is read yet.

        Args:
            name: Name of the denoiser in the pipeline.
            kind: Class of the denoiser.
            node: Processes of this machine, of which one reads the files.

        Raises:
            UserError: If the files are missing or do not hold the denoiser's weights.
        """

        def open_files(location: str, subfolder: str, **options: Any) -> Weights:
            arguments: Any = (kind, location, subfolder, self.quantization, self.dtype)
            files: dict[str, Any] = self._files(name, node) | options
            return Weights(*arguments, always_skipped=self.always_dense, **files)

        opened: Weights = self.source.load(name, open_files)
        return opened

    def _files(self, name: str, node: Node) -> dict[str, Any]:
        """Arguments of :class:`Weights` with the place of the denoiser's weights."""
        file = self.source.file_of(name)
        place = {"variant": self.source.variant_of(name)} if file is None else {"open_file": file.open}
        return {**place, "node": node, "changes": self.changes.get(name)}

    def sharded_denoiser(
        self,
        name: str,
        kind: type[nn.Module],
        block_classes: tuple[str, ...],
        adapt: Callable[[nn.Module], nn.Module],
        config: PeftConfig,
        shard: Callable[[nn.Module], None],
    ) -> nn.Module:
        """Load the denoiser with its adapter, sharding it part by part, so that no process ever has all weights.

        Args:
            name: Name of the denoiser in the pipeline.
            kind: Class of the denoiser.
            block_classes: Class names of the denoiser's repeated blocks.
            adapt: Function that puts the adapter into the denoiser; the weights are not loaded yet when it is called.
            config: Config of the adapter.
            shard: Function that shards one part of the denoiser, called when the part's weights are loaded: for blocks and
                large layers, finally for the denoiser itself.

        Raises:
            UserError: If a part cannot be read, or the adapter's method needs the base's weights to initialize the adapter.
        """
        check_block_by_block(config)

        def read(names: list[str], location: str, subfolder: str, **options: Any) -> None:
            weights.put(names)

        weights = self.weight_files(name, kind, self.node)
        parts = weights.in_parts(block_classes)
        weights.show_nothing()
        denoiser = adapt(weights.model.eval())
        same_adapter(denoiser)
        together = read_by_others(denoiser)
        for module, names in parts:
            self.source.load(name, partial(read, names))
            if module not in together:
                complete_adapter(module, config)
                shard(module)
        return denoiser


def _shape(kind: Any, dtype: torch.dtype, location: str, subfolder: str, **options: Any) -> nn.Module:
    return shape_part(kind, location, subfolder, dtype, **options)


def read_by_others(denoiser: nn.Module) -> set[nn.Module]:
    """Modules whose weights are read without calling the modules, by adapters or to copy them."""
    read: set[nn.Module] = set()
    for layer in denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            read.add(layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            read.update(layer.modules())
            read.discard(layer)
    return read
