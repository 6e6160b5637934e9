"""Bounds of an adapter's config, which may be mistyped or come with somebody else's adapter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lit_lora.adapters.patterns import pattern_value
from lit_lora.errors import UserError, check_least, check_texts

MATCH_SECONDS = 20.0
"""Time within which the regular expressions of a config must match the names of all layers."""

_HARMLESS_RANK = 1024
"""Rank up to which an adapter of a small layer wastes memory, but no more than that of a large one."""

_MAX_RANK = 1 << 16
"""Maximum ``r`` of methods whose rank may exceed the dimensions of a layer, such as VeRA."""

_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    for name in names:
        re.fullmatch(pattern, name)
        re.match(rf"(.*\\.)?({pattern})$", name)
"""


def check_bounds(config: PeftConfig, model: nn.Module) -> None:
    """Check an adapter's ranks, dropouts and regular expressions before memory is reserved and names are matched.

    Args:
        config: Config with target modules.
        model: Model into which the adapter goes.

    Raises:
        UserError: If a pattern is no text, a regular expression is wrong or does not end, a dropout is not in [0, 1), or a rank
            is below 1 or exceeds both the dimensions of a layer and ``_HARMLESS_RANK``.
    """
    names = [name for name, _ in model.named_modules()]
    for option in ("rank_pattern", "alpha_pattern"):
        check_texts(option, getattr(config, option, None) or ())
    _check_patterns([*_patterns(config)], names)
    _check_dropouts(config)
    rank = getattr(config, "init_r", None) or getattr(config, "r", None)
    if type(rank) is not int or isinstance(config, LoKrConfig):  # LoKr takes a large rank as "no decomposition"
        return
    if isinstance(config, LoraConfig | LoHaConfig):
        _check_ranks(config, model, rank)
    elif rank > _MAX_RANK:
        raise UserError(f"r={rank} of {type(config).__name__} is too large; it must be at most {_MAX_RANK}")


def warn_of_idle_rank(config: PeftConfig, model: nn.Module) -> None:
    """Warn if the rank of LoRA is above what any of the adapted layers can use, so that it only takes memory.

    Args:
        config: Config of the adapter.
        model: Model with the adapter.
    """
    if config.peft_type != "LORA":
        return
    options: Any = config
    sizes = {
        name: dimensions
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and (dimensions := _dimensions(layer.get_base_layer())) is not None
    }
    most, name = max(((min(dimensions), name) for name, dimensions in sizes.items()), default=(options.r, ""))
    if options.r > most:
        rank_zero_warn(
            f"r={options.r} is above {most}, the highest rank that an adapted layer can have ({name} has {sizes[name][0]} inputs "
            f"and {sizes[name][1]} outputs); the rest only takes memory: set r to at most {most}"
        )


def _check_dropouts(config: PeftConfig) -> None:
    """Refuse dropouts that are no probabilities, or drop all: PEFT takes them in some methods, which then learn nothing."""
    for name, value in vars(config).items():
        if name.endswith("dropout"):
            check_least(0, **{name: value})
            if value is not None and value >= 1:
                raise UserError(f"{name}={value} drops all, so that nothing is learned; it must be below 1")


def _check_ranks(config: PeftConfig, model: nn.Module, default: int) -> None:
    options: Any = config
    ranks = getattr(options, "rank_pattern", None) or {}
    for name, rank in (("r", default), *((f"rank_pattern[{key!r}]", rank) for key, rank in ranks.items())):
        check_least(1, **{name: rank if type(rank) is int else None})
    for name, layer in model.named_modules():
        dimensions = _dimensions(layer)
        if dimensions is None:
            continue
        rank = pattern_value(ranks, name, default)
        most = max(*dimensions, _HARMLESS_RANK)
        if type(rank) is not int or rank <= most:
            continue
        if check_target_module_exists(options, name):
            raise UserError(
                f"r={rank} is too large for {name}, which has {dimensions[0]} inputs and {dimensions[1]} outputs: it must be at"
                f" most {most}; lower r, or set rank_pattern for this layer"
            )


def _dimensions(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a layer that an adapter may change; None for other modules."""
    found: Any = layer
    if isinstance(layer, nn.Linear):
        return int(found.in_features), int(found.out_features)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return int(found.in_channels) * prod(found.kernel_size), int(found.out_channels)
    return None


def _patterns(config: PeftConfig) -> Iterator[str]:
    """The regular expressions in a config."""
    for option in ("target_modules", "exclude_modules"):
        value = getattr(config, option, None)
        if isinstance(value, str):
            yield value
    for option in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"):
        value = getattr(config, option, None) or ()
        yield from [value] if isinstance(value, str) else (each for each in value if isinstance(each, str))


def _check_patterns(patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"{pattern[:100]!r} is not a regular expression ({error}); correct the adapter's config"
            ) from error
    repeated = [pattern for pattern in patterns if re.search(r"[*+{]", pattern)]
    if not repeated:
        return
    # Matching cannot be interrupted in this process, so it is tried in another one.
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        subprocess.run(
            command,
            input=json.dumps([repeated, names]).encode(),
            capture_output=True,
            timeout=MATCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        started = (error.stdout or b"0").split()
        pattern = repeated[int(started[-1])] if started else repeated[0]
        raise UserError(
            f"the regular expression {pattern[:100]!r} in the adapter's config takes more than {MATCH_SECONDS:.0f} s for the"
            f" names of {len(names)} layers; write it without nested repeats, or list the layers"
        ) from None
