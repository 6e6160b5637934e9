"""What an adapter's files say about the settings that decide what its training learns, beside its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lit_lora.described import described, described_options, differences
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats.sampling_scheduler import scheduler_changes

_KEY = "ss_lit_lora_settings"
_PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}
"""diffusers' names for those of the model spec."""


def learned_settings(module: Any) -> dict[str, str]:
    """Texts of the settings by their keys in a config: objective, options of the family and caption dropout.

    Args:
        module: :class:`~lit_lora.LoraDiffusion`.
    """
    family = {f"model.family.{name}": text for name, text in described_options(module.family, without=ModelFamily)}
    objective = {f"model.objective.{name}": text for name, text in described_options(module.objective)}
    named = {
        "model.objective": type(module.objective).__name__,
        "model.caption_dropout": described(module.caption_dropout),
    }
    return family | named | objective


def settings_metadata(module: Any) -> dict[str, str]:
    """The entry of an adapter's metadata.

    Args:
        module: :class:`~lit_lora.LoraDiffusion`.
    """
    return {_KEY: json.dumps(learned_settings(module), sort_keys=True)}


def changed_settings(metadata: Mapping[str, str], module: Any) -> list[str]:
    """What a module trains otherwise than an adapter was trained, with both values.

    Args:
        metadata: Metadata of the adapter's files, of this project or others.
        module: :class:`~lit_lora.LoraDiffusion` whose objective is prepared.

    Raises:
        UserError: If an entry is damaged.
    """
    try:
        saved = {str(name): str(text) for name, text in json.loads(metadata.get(_KEY, "{}")).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"the metadata entry {_KEY!r} is damaged ({error!r}); export the adapter again") from error
    base, here = module.family.scheduler_config, module._scheduler_config
    there = dict(base)
    if prediction := _PREDICTIONS.get(metadata.get("modelspec.prediction_type", "")):
        there["prediction_type"] = prediction
    there |= scheduler_changes(metadata)
    schedules = [{f"scheduler.{name}": described(one.get(name)) for name in (there | here)} for one in (there, here)]
    changed = [*differences(saved, learned_settings(module)), *differences(*schedules)]
    return [f"{name} {before} in the adapter, {now} here" for name, before, now in changed]
