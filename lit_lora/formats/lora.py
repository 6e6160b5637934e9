"""Plain LoRA: what its tensors tell about ranks and alphas, and which configs are nothing but LoRA."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from lit_lora.adapters import plain_config
from lit_lora.adapters.names import PREFIX
from lit_lora.adapters.patterns import pattern_value
from lit_lora.errors import UserError
from lit_lora.formats.base import AdapterFiles

_MORE_THAN_LORA = (
    "bias",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
"""Options of PEFT's ``LoraConfig`` that train more than the two matrices of each layer."""
_TENSORS = re.compile(r"(?P<layer>.+)\.(?P<tensor>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")


def why_no_plain_lora(adapter: AdapterFiles) -> str:
    """The reason why an adapter is more than LoRA or DoRA in single layers; empty if it is not."""
    if not adapter.parts:
        return "it holds adapters of layers, and this one has new tokens alone"
    for part in adapter.parts.values():
        config = part.config
        if config.get("peft_type") != "LORA":
            return f"it holds LoRA, and this is {config.get('peft_type')}"
        for option in _MORE_THAN_LORA:
            if config.get(option) not in (None, False, "none", [], {}):
                return f"it holds LoRA of layers alone, and this adapter has {option}={config[option]!r}"
    return ""


def adapted_layer(key: str) -> str:
    """Name of the layer of a tensor of LoRA, LoHa or LoKr under PEFT's name; empty for other tensors."""
    found = re.match(rf"{re.escape(PREFIX)}(.+?)\.(lora|hada|lokr)_", key)
    return found[1] if found else ""


def layers_of(state: Mapping[str, Tensor], path: Path | str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a LoRA's state by layer, each under ``lora_A.weight``, ``lora_B.weight`` or ``lora_magnitude_vector``.

    Args:
        state: Tensors under PEFT's names.
        path: File that holds them, for errors.

    Raises:
        UserError: If a tensor is none of these, a layer lacks one of the first two, their ranks differ, or its magnitudes are
            not those of its outputs.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = _TENSORS.fullmatch(key.removeprefix(PREFIX))
        if found is None:
            raise UserError(f"{path} is no plain LoRA: it holds {key}")
        layers.setdefault(found["layer"], {})[found["tensor"]] = value
    for layer, tensors in layers.items():
        down, up = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
        if down is None or up is None:
            missing = "lora_A" if down is None else "lora_B"
            raise UserError(f"{path} is incomplete: it has no {missing} of {layer}; copy or export it again")
        # lora_B of a grouped convolution has the rank of one group.
        if min(down.ndim, up.ndim) < 2 or 0 in down.shape + up.shape or not _share_rank(down, up):
            raise UserError(
                f"{path} is damaged: lora_A and lora_B of {layer} have the shapes {tuple(down.shape)} and {tuple(up.shape)}, "
                f"which share no rank; export it again"
            )
        magnitude = tensors.get("lora_magnitude_vector")
        if magnitude is not None and magnitude.numel() != len(up):
            raise UserError(
                f"{path} is damaged: lora_magnitude_vector of {layer} has the shape {tuple(magnitude.shape)}, and the layer has "
                f"{len(up)} outputs; export it again"
            )
    return layers


def _share_rank(down: Tensor, up: Tensor) -> bool:
    """Whether the matrices belong to one layer, which may be a grouped convolution."""
    ranks = len(down), up.shape[1]
    return ranks[0] == ranks[1] or (
        down.ndim > 2 and ranks[0] % ranks[1] == 0 and len(up) % (ranks[0] // ranks[1]) == 0
    )


def effective_alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """The alpha of a layer for tools that scale the update by alpha / rank, whichever way PEFT scales it.

    Args:
        config: Plain config of a LoRA.
        layer: Name of the layer.
        rank: Rank of the layer.
    """
    alphas = config.get("alpha_pattern") or {}
    alpha = pattern_value(alphas, layer, config.get("lora_alpha", rank))
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1)


def lora_config(
    layers: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, float], denoiser: type[nn.Module] | None = None
) -> dict[str, Any]:
    """The plain PEFT config of a LoRA that comes without one.

    Args:
        layers: Result of :func:`layers_of`.
        alphas: Alphas by layer; layers without one have their rank as alpha, so that their update is not scaled.
        denoiser: Class of the adapted model; defaults to an unknown one.
    """
    ranks = {layer: len(tensors["lora_A.weight"]) for layer, tensors in layers.items()}
    alphas = {layer: plain_number(alphas.get(layer, rank)) for layer, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={only(layer): value for layer, value in ranks.items() if value != rank},
        alpha_pattern={only(layer): value for layer, value in alphas.items() if value != alpha},
        target_modules=targets(list(layers)),
        use_dora=any("lora_magnitude_vector" in tensors for tensors in layers.values()),
    )
    mapping = {"base_model_class": denoiser.__name__, "parent_library": denoiser.__module__} if denoiser else None
    return plain_config(config) | {"auto_mapping": mapping}


def fits(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, float]) -> bool:
    """Whether a config gives these layers these ranks and alphas, as far as it says anything about them.

    Args:
        config: Plain config of a LoRA.
        layers: Result of :func:`layers_of`.
        alphas: Alphas by layer.
    """
    ranks = config.get("rank_pattern") or {}
    for layer, tensors in layers.items():
        rank = len(tensors["lora_A.weight"])
        if pattern_value(ranks, layer, config.get("r")) != rank:
            return False
        if not math.isclose(effective_alpha(config, layer, rank), alphas.get(layer, rank), rel_tol=5e-3):
            return False
    return True


def own_ranks(config: Mapping[str, Any] | None) -> Callable[[str], int] | None:
    """Function that returns the rank of a layer according to a config, 0 if it is not adapted.

    Args:
        config: Plain config of a LoRA; None, or a config that PEFT does not take, gives None.
    """
    if config is None or config.get("peft_type") != "LORA":
        return None
    try:
        made = LoraConfig(**{**config, "inference_mode": False})
    except (TypeError, ValueError):
        return None
    ranks = made.rank_pattern or {}

    def rank(layer: str) -> int:
        targets = made.target_modules == "all-linear" or bool(check_target_module_exists(made, layer))
        return int(pattern_value(ranks, layer, made.r)) if targets else 0

    return rank


def plain_number(value: float) -> float | int:
    """A number as an int if it is one."""
    return int(value) if float(value).is_integer() else value


def only(layer: str) -> str:
    """A pattern for PEFT that matches this layer alone; PEFT would also take the name as the end of a longer one."""
    return f"^{layer}"


def targets(layers: list[str]) -> list[str] | str:
    """Names of target modules; a regular expression if a name is short and may be the end of another layer's name."""
    if all(re.search(r"\.\d+\.", layer) for layer in layers):
        return sorted(layers)
    return "|".join(re.escape(layer) for layer in sorted(layers))
