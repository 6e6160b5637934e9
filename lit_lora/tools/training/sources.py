"""The shards of a run of ``lit-lora train``: one folder, or several sets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_lora.datamodules.packing.pack_sets import PackedSets
from lit_lora.errors import UserError
from lit_lora.tools.training.choices import Choice
from lit_lora.tools.training.config import BACKGROUND
from lit_lora.tools.training.request import Request
from lit_lora.visible import visible

_VARYING = ("dropout", "shuffle_tags", "wildcards")
"""Options of captions that differ from pass to pass."""

_PRIOR = {"class_path": "lit_lora.objectives.PriorPreservation"}


def check_alone(request: Request) -> None:
    """Check that a ``dataset.toml`` is not given with other folders, or options that it has of its own.

    Raises:
        UserError: If it is.
    """
    file = next((one for one in request.folders if one.suffix.lower() == ".toml"), None)
    if file is None:
        return
    if len(request.folders) > 1:
        raise UserError(
            f"{visible(file)} names several sets itself; name it alone, or name the folders of images instead"
        )
    for option, instead in (("repeats", "num_repeats of its subsets"), ("class_images", "a subset with is_reg = true")):
        if getattr(request, option) is not None:
            raise UserError(
                f"{visible(file)} has {instead} in place of --{option}: change the file, and leave the option out"
            )


def can_be_cached(packed: PackedSets) -> bool:
    """Whether crops and captions of all sets are the same in all passes."""
    decoders = [one.decoder for one in packed.found.sets if one.decoder is not None]
    return all(
        decoder["center_crop"] and not any(decoder["captions"][name] for name in _VARYING) for decoder in decoders
    )


def uncached_choice(packed: PackedSets) -> Choice | None:
    """What the table of choices says of sets that cannot be cached; None if they can be."""
    if can_be_cached(packed):
        return None
    reason = "crops or captions of a set differ from pass to pass, so each step encodes images and captions itself"
    return Choice("cache", "none", reason, "data.init_args.train_sets")


def train_sets(packed: PackedSets, prefix: str, cache: Path | None) -> list[dict[str, Any]]:
    """The sets of a run's config.

    Args:
        packed: The packed sets.
        prefix: Text before each caption that is not one of class images.
        cache: Folder of the caches of all sets; None to read images.
    """
    sets: list[dict[str, Any]] = [copy.deepcopy(one) for one in packed.options["train_sets"]]
    for number, one in enumerate(sets):
        if cache is not None:
            one["shards"] = str(cache / str(number))
        if one.get("prior") and "decoder" not in one:  # that of the run has the trigger in it
            one["decoder"] = {"class_path": "lit_lora.datamodules.ImageDecoder", "init_args": {"center_crop": True}}
        if "decoder" in one:
            one["decoder"]["init_args"]["background"] = BACKGROUND
        if "decoder" in one and not one.get("prior"):
            captions = one["decoder"]["init_args"]["captions"]
            captions["prefix"] = prefix + captions["prefix"]
    return sets


def keys_of(packed: PackedSets, template: Mapping[str, Any]) -> dict[str, Any]:
    """Values for keys of the config that a ``dataset.toml`` gives, and the objective's prior if there are class images.

    Args:
        packed: The packed sets.
        template: Config of the base.
    """
    keys = {f"data.init_args.{name}": value for name, value in packed.found.data.items()}
    if any(one.prior for one in packed.found.sets):
        if "objective" not in template["model"]:
            keys["model.objective.class_path"] = "lit_lora.objectives.DDPM"
        keys["model.objective.init_args.prior"] = _PRIOR
    return keys
