"""LoHa and LoKr: tensors, which PEFT and LyCORIS call by the same names, and the configs that they tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoHaConfig, LoKrConfig
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from lit_lora.adapters import plain_config
from lit_lora.adapters.names import PREFIX
from lit_lora.adapters.patterns import pattern_value
from lit_lora.errors import UserError
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.lora import only, plain_number, targets

METHODS = ("LOHA", "LOKR")
"""PEFT's names of these methods."""

_LEFT = {"hada_w1_a", "hada_w2_a", "lokr_w1_a", "lokr_w2_a"}
"""Names of the left ones of two matrices that are multiplied, in Tucker form with a core between them."""

_Groups = dict[str, dict[str, Tensor]]


def groups_of(contents: AdapterFiles) -> _Groups:
    """The tensors of an adapter by layer and name, such as ``hada_w1_a``.

    Args:
        contents: LoHa or LoKr.
    """
    groups: _Groups = {}
    for key, value in contents.state.items():
        layer, _, end = key.removeprefix(PREFIX).rpartition(".")
        groups.setdefault(layer, {})[end] = value
    return groups


def alphas_of(contents: AdapterFiles) -> dict[str, float]:
    """The alpha of each layer of LoHa or LoKr."""
    alphas = contents.config.get("alpha_pattern") or {}
    default = contents.config["alpha"]
    return {layer: float(pattern_value(alphas, layer, default)) for layer in groups_of(contents)}


def ranks_of(contents: AdapterFiles) -> dict[str, int]:
    """The rank of each layer of LoHa or LoKr in its config, by which PEFT divides alpha."""
    ranks = contents.config.get("rank_pattern") or {}
    default = contents.config["r"]
    return {layer: int(pattern_value(ranks, layer, default)) for layer in groups_of(contents)}


def why_not_exact(contents: AdapterFiles) -> str:
    """The reason why LyCORIS would compute something else from the adapter's tensors than PEFT; empty if it would not."""
    if contents.config.get("modules_to_save"):
        return "it holds tensors of adapted layers alone, and this adapter has modules_to_save"
    ranks = ranks_of(contents)
    for layer, alpha in alphas_of(contents).items():
        rank = ranks[layer]
        full = all(f"{PREFIX}{layer}.{name}" in contents.state for name in ("lokr_w1", "lokr_w2"))
        if full and alpha != rank:
            return (
                f"LyCORIS does not scale the update of {layer}, whose two factors are full matrices, and PEFT scales it by "
                f"alpha / r = {alpha / rank:.3g}; set alpha to r"
            )
    return ""


def config_of(
    groups: Mapping[str, Mapping[str, Tensor]],
    kind: str,
    own: Mapping[str, Any] | None,
    path: Path,
    denoiser: type[nn.Module] | None,
) -> dict[str, Any]:
    """The plain PEFT config of LoHa or LoKr.

    Args:
        groups: Tensors by layer and name, with ``alpha``.
        kind: ``hada`` or ``lokr``.
        own: Config in the file's metadata, which is returned if it fits; None if there is none.
        path: The file, for errors.
        denoiser: Class of the adapted model; None if it is not known.

    Raises:
        UserError: If tensors are missing, have other names, or PEFT has no such method.
    """
    ranks: dict[str, int] = {}
    for layer, group in groups.items():
        _check(layer, group, kind, path)
        factor = next((group[name] for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in group), None)
        # A LoKr of two full matrices has no rank: any rank that PEFT takes for "no decomposition" will do.
        ranks[layer] = 2 * max(group["lokr_w2"].shape[:2]) if factor is None else len(factor)
        if "lokr_w1" in group and factor is None:
            ranks[layer] = max(ranks[layer], 2 * max(group["lokr_w1"].shape))
    alphas = {
        layer: plain_number(float(group["alpha"]))
        if "alpha" in group and not {"lokr_w1", "lokr_w2"} <= group.keys()
        else rank
        for (layer, group), rank in zip(groups.items(), ranks.values(), strict=True)
    }
    if (
        own is not None
        and own.get("peft_type") == {"hada": "LOHA", "lokr": "LOKR"}[kind]
        and _tells_alphas(own, groups)
    ):
        return dict(own)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    options: dict[str, Any] = {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {only(layer): value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {only(layer): value for layer, value in alphas.items() if value != alpha},
        "target_modules": targets(list(groups)),
        "use_effective_conv2d": any(name.endswith(("t1", "t2")) for group in groups.values() for name in group),
    }
    if kind == "hada":
        config: LoHaConfig | LoKrConfig = LoHaConfig(**options)
    else:
        both = any("lokr_w1_a" in group for group in groups.values())
        config = LoKrConfig(**options, decompose_both=both, decompose_factor=_factor(groups, path))
    mapping = {"base_model_class": denoiser.__name__, "parent_library": denoiser.__module__} if denoiser else None
    return plain_config(config) | {"auto_mapping": mapping}


def _tells_alphas(config: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a config has the alphas of the tensors, which other programs may have changed; they may be rounded."""
    alphas = config.get("alpha_pattern") or {}
    return all(
        math.isclose(
            pattern_value(alphas, layer, config.get("alpha", 0)),
            float(group["alpha"]),
            rel_tol=5e-3,
        )
        for layer, group in groups.items()
        if "alpha" in group
    )


def _check(layer: str, group: Mapping[str, Tensor], kind: str, path: Path) -> None:
    names = group.keys() - {"alpha"}
    others = sorted(name for name in names if not name.startswith(kind))
    if others:
        raise UserError(
            f"{path}: {layer} has {others[0]}, which PEFT's {'LoHa' if kind == 'hada' else 'LoKr'} does not have"
        )
    if kind == "hada":
        missing = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} - names
        if ("hada_t1" in names) != ("hada_t2" in names):
            missing |= {"hada_t1", "hada_t2"} - names
    else:
        missing = set()
        for matrix in ("lokr_w1", "lokr_w2"):
            if matrix not in names:
                missing |= {f"{matrix}_a", f"{matrix}_b"} - names
    if missing:
        raise UserError(f"{path} is incomplete: it has no {min(missing)} of {layer}; copy or export it again")
    check_shapes(layer, group, path)


def check_shapes(layer: str, group: Mapping[str, Tensor], path: Path | str) -> None:
    """Check that the tensors of a layer fit together.

    Args:
        layer: Name of the layer, for errors.
        group: Its tensors by LyCORIS' names.
        path: File that holds them, for errors.

    Raises:
        UserError: If one has an impossible shape, or two that are multiplied share no rank.
    """
    for name, value in sorted(group.items()):
        fits = value.numel() == 1 if name == "alpha" else value.ndim >= 2 and 0 not in value.shape
        if not fits:
            raise UserError(
                f"{path} is damaged: {name} of {layer} has the shape {tuple(value.shape)}; copy or export it again"
            )
    for name in sorted(group.keys() & _LEFT):
        left, right = group[name], group.get(f"{name[:-1]}b")
        core = group.get(name.removesuffix("_a").replace("_w", "_t"))
        if right is None:
            continue
        rank = left.shape[1] if core is None else core.shape[1]
        if rank != right.shape[0] or (core is not None and core.shape[0] != left.shape[0]):
            raise UserError(
                f"{path} is damaged: {name} and {name[:-1]}b of {layer} have the shapes {tuple(left.shape)} and "
                f"{tuple(right.shape)}, which share no rank; copy or export it again"
            )


def _factor(groups: Mapping[str, Mapping[str, Tensor]], path: Path) -> int:
    """The ``decompose_factor`` with which PEFT divides the dimensions of all layers as these tensors do."""
    shapes = [(_left(group), _right(group)) for group in groups.values()]
    sizes = sorted({size for pair in shapes for sides in pair for size in sides})
    # The second factor's inputs may be multiplied by the size of a convolution's kernel.
    for areas in ((1,), (1, 9, 25, 49)):
        for factor in (-1, *sizes):
            if all(
                factorization(a * b, factor) == (a, b)
                and any(d % area == 0 and factorization(c * (d // area), factor) == (c, d // area) for area in areas)
                for (a, c), (b, d) in shapes
            ):
                return factor
    raise UserError(
        f"{path} divides the layers of a LoKr in a way that PEFT has no decompose_factor for; merge it with the base"
    )


def _left(group: Mapping[str, Tensor]) -> tuple[int, int]:
    """Outputs and inputs of a LoKr's first factor."""
    if "lokr_w1" in group:
        return group["lokr_w1"].shape[0], group["lokr_w1"].shape[1]
    return group["lokr_w1_a"].shape[0], group["lokr_w1_b"].shape[1]


def _right(group: Mapping[str, Tensor]) -> tuple[int, int]:
    """Outputs and inputs of a LoKr's second factor."""
    if "lokr_w2" in group:
        return group["lokr_w2"].shape[0], group["lokr_w2"].shape[1]
    outputs = group["lokr_w2_a"].shape[1 if "lokr_t2" in group else 0]
    return outputs, group["lokr_w2_b"].shape[1]
