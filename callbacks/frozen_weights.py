"""Fingerprints of a module's frozen weights, which no checkpoint of its adapter holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_lora.adapters import adapter_keys

_LOOKED_AT = 256
"""Bytes of each weight that are looked at: other weights differ everywhere, and whole ones would take seconds on a CPU."""


def frozen_weights(module: nn.Module) -> dict[str, str]:
    """Fingerprints of a module's parameters by name; empty ones for those that are trained, and for shards.

    Args:
        module: Module with its adapter.
    """
    trained = adapter_keys(module)
    found = {name: "" if name in trained else _fingerprint(weight) for name, weight in module.named_parameters()}
    return {without_compiling(name): text for name, text in found.items()}


def without_compiling(name: str) -> str:
    """Name of a parameter without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "")


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


def _fingerprint(weight: Tensor) -> str:
    weight = weight.detach()
    # Shards, tensors of other libraries, and what has no values yet are not compared.
    if type(weight) is not Tensor or weight.is_meta or hasattr(weight, "ds_id"):
        return ""
    content = weight.reshape(-1).contiguous().view(torch.uint8)
    some = content[:: max(1, len(content) // _LOOKED_AT)].cpu().numpy().tobytes()
    return hashlib.blake2b(f"{tuple(weight.shape)} {weight.dtype} ".encode() + some, digest_size=6).hexdigest()
