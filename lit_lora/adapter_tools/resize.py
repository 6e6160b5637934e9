"""Lowers the ranks of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch

from lit_lora.adapter_tools.budget import Budget, Components, Spectrum
from lit_lora.adapter_tools.lora_layer import LoraLayer
from lit_lora.adapter_tools.low_rank import one_thread
from lit_lora.adapter_tools.plain_lora import Layers, lora_layers, with_layers
from lit_lora.errors import UserError
from lit_lora.formats import AdapterFiles
from lit_lora.mapped import Keep, keep_in_memory, release

Measure = Callable[[AdapterFiles], int]
"""Size of the largest file into which an adapter is written."""


@dataclass(frozen=True)
class ResizedLayer:
    """What became of one layer.

    Args:
        before: Rank before.
        after: Rank after.
        kept: Share of the energy that is kept.
        energy: Energy before.
    """

    before: int
    after: int
    kept: float
    energy: float


@dataclass(frozen=True)
class Resized:
    """A resized adapter.

    Args:
        adapter: The adapter.
        layers: What became of each layer.
    """

    adapter: AdapterFiles
    layers: dict[str, ResizedLayer]

    @property
    def kept(self) -> float:
        """Share of the energy of all layers that is kept."""
        return kept_share(self.layers.values())


def kept_share(layers: Collection[ResizedLayer]) -> float:
    """Share of the energy of several layers together that is kept."""
    total = sum(one.energy for one in layers)
    return sum(one.kept * one.energy for one in layers) / total if total > 0 else 1.0


@one_thread()
def resize(
    adapter: AdapterFiles, path: object, budget: Budget, measure: Measure, keep: Keep = keep_in_memory
) -> Resized:
    """Lower the ranks of a LoRA or DoRA by truncated singular value decompositions.

    Alphas stay, so that the file tells them as before, and the factors make up for the scale that changes with the rank. Layers
    whose rank does not change keep their bits. DoRA keeps its magnitudes; its energy is that of the update beside them.

    Args:
        adapter: Adapter.
        path: Where it was read from, for errors.
        budget: How far to lower the ranks.
        measure: Size of the file for an adapter, for a budget of bytes.
        keep: Puts new tensors where they stay; defaults to the memory.

    Raises:
        UserError: If the adapter is not LoRA or DoRA, the rank is above that of every layer, or the budget is too small.
    """
    parts = lora_layers(adapter, path)
    layers = dict(_flat(parts))
    highest = max(one.rank for one in layers.values())
    if budget.rank is not None and budget.rank > highest:
        raise UserError(
            f"rank={budget.rank} is above {highest}, the highest rank in {path}: resizing only lowers ranks; give at most "
            f"{highest}"
        )
    spectra = {name: _spectrum(layer) for name, layer in layers.items()}
    components = budget.components(spectra, lambda some: measure(_placeholders(adapter, parts, layers, some)))
    made = {name: _truncated(name, layer, components[name], keep) for name, layer in layers.items()}
    changes = {
        name: ResizedLayer(layer.rank, made[name].rank, spectra[name].kept(components[name]), spectra[name].total)
        for name, layer in layers.items()
    }
    return Resized(with_layers(adapter, _nested(parts, made)), changes)


def _flat(parts: dict[str, Layers]) -> Iterator[tuple[str, LoraLayer]]:
    """All layers; those of text encoders with the encoder's name before their own."""
    for part, layers in parts.items():
        for name, layer in layers.items():
            yield name if part == "denoiser" else f"{part}.{name}", layer


def _nested(parts: dict[str, Layers], flat: Layers) -> dict[str, Layers]:
    values = iter(flat.values())
    return {part: {name: next(values) for name in layers} for part, layers in parts.items()}


def _spectrum(layer: LoraLayer) -> Spectrum:
    energies = layer.update().singular_values().square().sum(0)
    release(layer.down, layer.up)
    return Spectrum(energies, float(energies.sum()), layer.groups, layer.bytes_per_step)


def _truncated(name: str, layer: LoraLayer, components: int, keep: Keep) -> LoraLayer:
    if components * layer.groups >= layer.rank:
        return layer
    made = layer.with_update(layer.update().truncated(components), name)
    release(layer.down, layer.up)
    return made.kept(keep)


def _placeholders(
    adapter: AdapterFiles, parts: dict[str, Layers], layers: Layers, components: Components
) -> AdapterFiles:
    """An adapter of zeros whose file has the same size."""

    def empty(layer: LoraLayer, rank: int) -> LoraLayer:
        down = torch.zeros(rank, *layer.down.shape[1:], dtype=layer.down.dtype)
        up = torch.zeros(len(layer.up), rank // layer.groups, *layer.up.shape[2:], dtype=layer.up.dtype)
        return replace(layer, down=down, up=up)

    zeros = {name: empty(layer, components[name] * layer.groups) for name, layer in layers.items()}
    return with_layers(adapter, _nested(parts, zeros))
