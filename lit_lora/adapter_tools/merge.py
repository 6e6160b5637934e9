"""Merges several adapters into one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lit_lora.adapter_tools.base_model import comparable
from lit_lora.adapter_tools.lora_layer import LoraLayer
from lit_lora.adapter_tools.low_rank import LowRank, one_thread
from lit_lora.adapter_tools.merged_metadata import merged_metadata
from lit_lora.adapter_tools.named_adapter import NamedAdapter
from lit_lora.adapter_tools.plain_lora import Layers, in_parts, lora_layers, patterns
from lit_lora.errors import UserError, check_whole
from lit_lora.families import ModelFamily
from lit_lora.formats import AdapterFiles
from lit_lora.formats.find import check_family, families_of_layers
from lit_lora.formats.lora import targets
from lit_lora.mapped import Keep, keep_in_memory, release

_CHOICE_OF_LAYERS = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
"""Options of a config that are of no use beside a list of all layers."""


@one_thread()
def merge(
    adapters: Sequence[NamedAdapter],
    rank: int | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    keep: Keep = keep_in_memory,
) -> AdapterFiles:
    """Merge LoRAs of one base into one whose update of each layer is the weighted sum of theirs.

    Without a rank the factors are concatenated, so that ranks add and the sum is exact but for the rounding of the weights into
    the factors. With a rank, or where the sum of ranks exceeds what the layer can have, the sum is decomposed from its factors.
    The scale of the result is 1 everywhere.

    Args:
        adapters: The adapters.
        rank: Maximum rank of each layer; defaults to None, the sum of the ranks.
        base: Name of the base of all adapters, for the result; defaults to the one that they tell.
        dtype: dtype of the result; defaults to the widest of the adapters' dtypes.
        keep: Puts new tensors where they stay; defaults to the memory.

    Raises:
        UserError: If an adapter is not LoRA, the adapters have different bases or families or were trained over different
            adapters, layers differ in shape, or the rank is above every sum of ranks.
    """
    check_whole(1, rank=rank)
    for one in adapters:
        if not math.isfinite(one.weight):
            raise UserError(f"the weight {one.weight} of {one.path} is not finite; give a number such as 0.7")
    base = _common_base(adapters, base)
    sources = [(one, lora_layers(one.adapter, one.path)) for one in adapters]
    _check_no_magnitudes(sources)
    _check_rank(rank, sources)
    made: dict[str, Layers] = {}
    for part in dict.fromkeys(part for _, parts in sources for part in parts):
        having = [(one, parts[part]) for one, parts in sources if part in parts]
        made[part] = {}
        for name in dict.fromkeys(name for _, layers in having for name in layers):
            layer = _merged(name, [(one, layers[name]) for one, layers in having if name in layers], rank, dtype)
            made[part][name] = layer.kept(keep)
    return _assembled(adapters, made, base)


def _merged(
    name: str, sources: Sequence[tuple[NamedAdapter, LoraLayer]], rank: int | None, dtype: torch.dtype | None
) -> LoraLayer:
    """One layer of the result."""
    (first, layer), *others = sources
    for one, other in others:
        if (other.weight_shape, other.groups) != (layer.weight_shape, layer.groups):
            raise UserError(
                f"{first.path} and {one.path} are adapters of different models: {name} has an update of the shape "
                f"{layer.weight_shape} with {layer.groups} groups in the first and {other.weight_shape} with {other.groups} in "
                f"the second; merge adapters of one base"
            )
    total = LowRank.total([each.update().scaled(one.weight) for one, each in sources])
    components = total.most if rank is None else min(total.most, max(1, rank // layer.groups))
    if components < total.rank:
        total = total.truncated(components)
    for _, each in sources:
        release(each.down, each.up)
    if dtype is None:
        dtype = reduce(torch.promote_types, [tensor.dtype for _, each in sources for tensor in (each.down, each.up)])
    unscaled = replace(layer, alpha=float(total.rank * layer.groups), rslora=False)
    return unscaled.with_update(total, name, dtype)


def _common_base(adapters: Sequence[NamedAdapter], base: str | None) -> str | None:
    """The base of all adapters."""
    families = {one.adapter.family: one for one in adapters if one.adapter.family is not None}
    if len(families) > 1:
        first, second, *_ = families.values()
        raise UserError(
            f"{first.path} is an adapter of {_family(first)} and {second.path} of {_family(second)}; merge adapters of one base"
        )
    _check_layers(adapters, next(iter(families), None))
    if base is not None:
        return base
    told = {one.path: one.adapter.base for one in adapters}
    names = {comparable(name): path for path, name in told.items() if name}
    if len(names) > 1:
        first_path, second_path, *_ = names.values()
        raise UserError(
            f"{first_path} says that its base is {told[first_path]!r}, and {second_path} {told[second_path]!r}; merge adapters "
            f"of one base. If both mean the same one, name it with --base"
        )
    silent = [path for path, name in told.items() if not name]
    if silent and not (len(families) == 1 and all(one.adapter.family for one in adapters)) and len(adapters) > 1:
        raise UserError(f"{silent[0]} tells neither its base nor its family; name the base of all adapters with --base")
    return next(filter(None, told.values()), None)


def _check_layers(adapters: Sequence[NamedAdapter], family: type[ModelFamily] | None) -> None:
    """Refuse adapters whose files tell no family, and whose layers are certainly those of another one than the others'."""
    if family is not None:
        for one in adapters:
            if one.adapter.family is None:
                check_family(one.adapter, family, one.path)
        return
    possible = {one.path: found for one in adapters if (found := families_of_layers(one.adapter))}
    if possible and not set.intersection(*map(set, possible.values())):
        told = [f"{path} of {' or '.join(kind.__name__ for kind in kinds)}" for path, kinds in possible.items()]
        raise UserError(
            f"by their layers, {' and '.join(told)} are adapters of different families; merge adapters of one base"
        )


def _family(one: NamedAdapter) -> str:
    return "" if one.adapter.family is None else one.adapter.family.__name__


def _check_no_magnitudes(sources: Sequence[tuple[NamedAdapter, Mapping[str, Layers]]]) -> None:
    for one, parts in sources:
        if any(layer.magnitude is not None for layers in parts.values() for layer in layers.values()):
            raise UserError(
                f"{one.path} is DoRA, whose magnitudes scale the sum of base and update, so that updates do not add up; merge it "
                f"into its base with --into, alone"
            )


def _check_rank(rank: int | None, sources: Sequence[tuple[NamedAdapter, Mapping[str, Layers]]]) -> None:
    """Refuse a rank that no layer can reach."""
    if rank is None:
        return
    sums: dict[tuple[str, str], int] = {}
    for _, parts in sources:
        for part, layers in parts.items():
            for name, layer in layers.items():
                sums[part, name] = sums.get((part, name), 0) + layer.rank
    highest = max(sums.values())
    if rank > highest:
        raise UserError(
            f"rank={rank} is above {highest}, the highest sum of the adapters' ranks; leave out --rank, which gives the exact sum"
        )


def _all_tokens(named: Sequence[NamedAdapter]) -> dict[str, Mapping[str, Tensor]]:
    tokens: dict[str, Mapping[str, Tensor]] = {}
    for source in named:
        one = source.adapter
        if one.new_tokens and source.weight != 1:
            warnings.warn(
                f"the new tokens {', '.join(one.new_tokens)} of {source.path} are kept as they are: the weight {source.weight:g} "
                f"is that of its layers",
                stacklevel=4,
            )
        if both := sorted(tokens.keys() & one.new_tokens.keys()):
            raise UserError(
                f"two of the adapters have a new token {both[0]}, whose embeddings cannot be merged; give the file of layers of "
                f"one adapter, such as pytorch_lora_weights.safetensors"
            )
        tokens |= one.new_tokens
    return tokens


def _assembled(named: Sequence[NamedAdapter], made: Mapping[str, Layers], base: str | None) -> AdapterFiles:
    """The result's files, with configs that list its layers."""
    adapters = [one.adapter for one in named]
    first = adapters[0]
    families = [one.family for one in adapters if one.family is not None]
    whole = replace(
        first,
        family=families[0] if families else None,
        denoiser_config=next((one.denoiser_config for one in adapters if one.denoiser_config), {}),
        metadata=merged_metadata(named),
        new_tokens=_all_tokens(named),
    )
    configs: dict[str, Mapping[str, Any]] = {}
    for part, layers in made.items():
        ranks = {name: layer.rank for name, layer in layers.items()}
        usual, pattern = patterns(ranks)
        config = next(one.parts[part].config for one in adapters if part in one.parts)
        configs[part] = {
            **config,
            **_CHOICE_OF_LAYERS,
            "target_modules": targets(list(layers)),
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "use_rslora": False,
            "init_lora_weights": True,
            "base_model_name_or_path": base,
        }
    return in_parts(whole, {part: (layers, configs[part]) for part, layers in made.items()})
