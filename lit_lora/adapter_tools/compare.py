"""How far two adapters are from each other."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_lora.adapter_tools.describe import method_name
from lit_lora.adapter_tools.low_rank import LowRank, one_thread
from lit_lora.adapter_tools.plain_lora import Layers, beyond_lora, lora_layers
from lit_lora.errors import UserError
from lit_lora.formats import AdapterFiles
from lit_lora.formats.own_metadata import differing_own
from lit_lora.mapped import release

_TOLD_BY_LAYERS = frozenset({"alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora"})
"""Entries of a LoRA's config whose effect the layers' ranks and distances show."""
_OF_NO_EFFECT = frozenset({"peft_version"})


@dataclass(frozen=True)
class Distance:
    """How far two updates of a layer are from each other, in Frobenius norms.

    Args:
        first: Norm of the first.
        second: Norm of the second.
        difference: Norm of the difference.
        inner: Inner product.
        ranks: Ranks of both; None where there are none.
    """

    first: float
    second: float
    difference: float
    inner: float
    ranks: tuple[int, int] | None = None

    @property
    def relative(self) -> float:
        """The difference as a share of the first; 0 for equal ones, infinite if only the first is zero."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.first if self.first > 0 else math.inf

    @property
    def cosine(self) -> float:
        """The cosine of the angle between both; NaN if one of them is zero."""
        product = self.first * self.second
        return max(-1.0, min(1.0, self.inner / product)) if product > 0 else math.nan


@dataclass(frozen=True)
class Comparison:
    """The differences of two adapters.

    Args:
        config: Values of both in entries of the configs that differ, by entry; encoders' entries begin with the encoder's name.
            Entries of the metadata that change what an adapter computes are among them.
        only_first: Layers that only the first has.
        only_second: Layers that only the second has.
        layers: Distances of the common layers.
    """

    config: dict[str, tuple[Any, Any]]
    only_first: list[str]
    only_second: list[str]
    layers: dict[str, Distance]

    @property
    def total(self) -> Distance:
        """The distance of the common layers together."""
        return together(self.layers.values())


def together(distances: Collection[Distance]) -> Distance:
    """The distance of the updates of several layers together, without ranks."""
    first, second, difference = (
        math.hypot(*(getattr(one, name) for one in distances)) for name in ("first", "second", "difference")
    )
    return Distance(first, second, difference, sum(one.inner for one in distances))


@one_thread()
def compare(first: AdapterFiles, second: AdapterFiles, paths: tuple[str, str]) -> Comparison:
    """Compare two adapters of the same method.

    The updates of LoRAs are compared without being formed, so that ranks and scales may differ; DoRA's magnitudes are rows of
    their own. Of other methods single tensors are compared, and of new tokens their embeddings.

    Args:
        first: Adapter.
        second: Adapter to compare with it.
        paths: Where they were read from, for errors.

    Raises:
        UserError: If the methods differ, or a layer differs in shape.
    """
    kinds = [{str(part.config.get("peft_type")) for part in one.parts.values()} for one in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{paths[0]} is {method_name(first)}, and {paths[1]} is {method_name(second)}: their layers cannot be compared"
        )
    names: list[list[str]]
    by_layer = not (beyond_lora(first) or beyond_lora(second))
    if not by_layer:
        tensors = [_tensors(one) for one in (first, second)]
        names = [list(one) for one in tensors]
        distances = {name: _of_tensors(name, tensors, paths) for name in names[0] if name in tensors[1]}
    else:
        layers = [
            _flat(lora_layers(one, path) if one.parts else {}) for one, path in zip((first, second), paths, strict=True)
        ]
        names = [list(one) for one in layers]
        distances = dict(_of_layers(layers[0], layers[1], paths))
    embeddings = [_embeddings(one) for one in (first, second)]
    names = [known + list(rows) for known, rows in zip(names, embeddings, strict=True)]
    distances |= {name: _of_tensors(name, embeddings, paths) for name in embeddings[0] if name in embeddings[1]}
    only_first, only_second = (sorted(set(names[i]) - set(names[1 - i])) for i in (0, 1))
    return Comparison(
        config=_config_differences(first, second, _TOLD_BY_LAYERS if by_layer else frozenset()),
        only_first=only_first,
        only_second=only_second,
        layers=distances,
    )


def _of_layers(first: Layers, second: Layers, paths: tuple[str, str]) -> Iterator[tuple[str, Distance]]:
    for name, one in first.items():
        if (other := second.get(name)) is None:
            continue
        _check_shapes(name, one.weight_shape, other.weight_shape, paths)
        update, against = one.update(), other.update()
        difference = LowRank.total([update, against.scaled(-1)]).norm()
        norms = update.norm(), against.norm()
        yield name, Distance(*norms, difference, update.inner(against), (one.rank, other.rank))
        release(one.down, one.up, other.down, other.up)
        if one.magnitude is not None and other.magnitude is not None:
            yield f"{name} (magnitude)", _distance(one.magnitude, other.magnitude)


def _of_tensors(name: str, tensors: list[dict[str, Tensor]], paths: tuple[str, str]) -> Distance:
    one, other = tensors[0][name], tensors[1][name]
    _check_shapes(name, tuple(one.shape), tuple(other.shape), paths, " or ranks")
    return _distance(one, other)


def _distance(first: Tensor, second: Tensor) -> Distance:
    one, other = first.detach().double().flatten(), second.detach().double().flatten()
    return Distance(float(one.norm()), float(other.norm()), float((one - other).norm()), float(one @ other))


def _check_shapes(
    name: str, first: tuple[int, ...], second: tuple[int, ...], paths: tuple[str, str], or_else: str = ""
) -> None:
    if first != second:
        raise UserError(
            f"{name} has the shape {first} in {paths[0]} and {second} in {paths[1]}: they are adapters of "
            f"different models{or_else}"
        )


def _flat(parts: Mapping[str, Layers]) -> Layers:
    return {_full_name(part, name): layer for part, layers in parts.items() for name, layer in layers.items()}


def _tensors(adapter: AdapterFiles) -> dict[str, Tensor]:
    return {_full_name(part, key): tensor for part, one in adapter.parts.items() for key, tensor in one.state.items()}


def _embeddings(adapter: AdapterFiles) -> dict[str, Tensor]:
    """The vectors of new tokens, one by one, since their number may differ."""
    return {
        f"{token} ({encoder}, vector {number})": vector
        for token, rows in adapter.new_tokens.items()
        for encoder, vectors in rows.items()
        for number, vector in enumerate(vectors, 1)
    }


def _full_name(part: str, name: str) -> str:
    return name if part == "denoiser" else f"{part}.{name}"


def _config_differences(first: AdapterFiles, second: AdapterFiles, told: frozenset[str]) -> dict[str, tuple[Any, Any]]:
    """Entries that differ, but for those that layers have told already."""
    found: dict[str, tuple[Any, Any]] = {}
    for part, files in first.parts.items():
        if part not in second.parts:
            continue
        one, other = files.config, second.parts[part].config
        for entry in sorted((one.keys() | other.keys()) - told - _OF_NO_EFFECT):
            values = one.get(entry), other.get(entry)
            if values[0] != values[1]:
                found[_full_name(part, entry)] = values
    for entry in differing_own(first.metadata, second.metadata):
        found[entry] = first.metadata.get(entry), second.metadata.get(entry)
    return found
