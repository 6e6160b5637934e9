"""Fingerprints of a module's frozen weights, which no checkpoint of its adapter holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_lora.adapters import adapter_keys, without_compiling
from lit_lora.distributed.collectives import gather

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""Integers by their bytes. Their sums are exact, so they do not depend on how a weight is sharded."""


def frozen_weights(module: nn.Module, reads_full: bool = True) -> dict[str, str]:
    """Fingerprints of a module's parameters by name; empty ones for those that are trained. A collective call.

    Every value counts, and sharded weights have the fingerprints of full ones. Weights under DeepSpeed's ZeRO-3 and tensors of
    other libraries have empty ones.

    Args:
        module: Module with its adapter.
        reads_full: Whether this process reads the weights that all processes have in full; one has to. Defaults to True.
    """
    trained = adapter_keys(module)
    frozen = ((name, one) for name, one in module.named_parameters() if name not in trained)
    sums: dict[str, dict[int, tuple[int, int]]] = {}
    for shards in gather({name: _sums(one) for name, one in frozen if reads_full or isinstance(one, DTensor)}):
        for name, some in shards.items():
            sums.setdefault(name, {}).update(some)  # copies of a shard count once
    found = {name: _text(one, sums.get(name, {})) for name, one in module.named_parameters()}
    return {without_compiling(name): text for name, text in found.items()}


def changed_weights(saved: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What frozen weights of a checkpoint's run and of this one differ in, one line each.

    Args:
        saved: Result of :func:`frozen_weights` in that run; if it is empty, nothing is compared.
        here: The same in this run.
    """
    if not saved or not here:
        return []
    both = [name for name in saved if saved[name] and here.get(name)]
    kinds = {
        "have other values or another shape here": [name for name in both if saved[name] != here[name]],
        "are not here": sorted(saved.keys() - here.keys()),
        "are new here": sorted(here.keys() - saved.keys()),
    }
    return [f"{len(names)} weights of the base {what}, such as {names[0]}" for what, names in kinds.items() if names]


def _sums(weight: Any) -> dict[int, tuple[int, int]]:
    """Two sums of this process's rows of a weight, by the number of the first row; nothing of what cannot be compared.

    They are the sums of all rows and of all columns, each times its number: other values, rows or columns have others.
    """
    first, values = 0, weight.detach()
    if isinstance(values, DTensor):
        (shard,) = values.__create_chunk_list__()
        if shard.sizes[1:] != values.shape[1:]:
            return {}
        first, values = shard.offsets[0] if shard.offsets else 0, values.to_local()
    if type(values) is not Tensor or values.is_meta or hasattr(weight, "ds_id"):
        return {}
    if not values.numel():
        return {first: (0, 0)}
    content = values.reshape(len(values) if values.ndim else 1, -1).contiguous().view(torch.uint8)
    words = content.view(_WORDS[math.gcd(content.shape[1], 8)])
    rows, columns = words.sum(1, dtype=torch.int64), words.sum(0, dtype=torch.int64)
    return {first: (_numbered(rows, first), _numbered(columns, 0))}


def _numbered(sums: Tensor, first: int) -> int:
    return int((sums * torch.arange(first + 1, first + 1 + len(sums), device=sums.device)).sum())


def _text(weight: Tensor, sums: Mapping[int, tuple[int, int]]) -> str:
    if not sums:
        return ""
    both = "".join(f" {sum(values) % 2**64:016x}" for values in zip(*sums.values(), strict=True))
    return f"{tuple(weight.shape)} {weight.dtype}{both}"
