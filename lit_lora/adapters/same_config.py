"""Settings of an adapter that a resumed run must share with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from lit_lora.adapters.keys import adapter_configs
from lit_lora.adapters.methods import AdapterMethod, method_of
from lit_lora.errors import UserError

_NOT_PART_OF_THE_FUNCTION = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
    | {"init_lora_weights", "init_weights", "runtime_config", "task_type", "loftq_config", "target_modules"}
)
"""Fields of a PEFT config that do not change what the adapter computes from its weights."""


def check_adapter_config(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that a checkpoint's adapter computes the same function of its weights as this one.

    Args:
        here: Plain config of this run's adapter.
        saved: Plain config from the checkpoint.

    Raises:
        UserError: If a setting such as ``lora_alpha`` differs.
    """
    schedule = _schedule_fields(saved)
    changed = [
        f"{name} is {here[name]!r}, in the checkpoint {saved[name]!r}"
        for name in sorted(here.keys() & saved.keys() - _NOT_PART_OF_THE_FUNCTION - schedule)
        if here[name] != saved[name]
    ]
    if changed:
        raise UserError(
            "the checkpoint holds another adapter: " + "; ".join(changed) + ". "
            "Load it with the adapter settings that it was made with, or start without ckpt_path."
        )


def check_saved_configs(
    module: nn.Module, saved: Mapping[str, Mapping[str, Any]], before_loading: bool = False
) -> None:
    """Check a module's adapters by the configs of :func:`adapter_configs` in a checkpoint.

    Args:
        module: Module with its adapters.
        saved: Plain configs from the checkpoint, by the same names; empty if it holds none.
        before_loading: Whether the weights are not loaded yet, which gives layers the ranks that they were pruned to; off by
            default.

    Raises:
        UserError: If a setting such as ``lora_alpha`` differs.
    """
    here = adapter_configs(module)
    pruned = {"alpha_pattern", "rank_pattern"} if before_loading else set()
    for name, config in saved.items():
        check_adapter_config({field: here[name][field] for field in here.get(name, {}).keys() - pruned}, config)


def function_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings on which it depends what an adapter computes from its weights; without those that are off or empty.

    Args:
        config: Plain config of the adapter.
    """
    return {name: value for name, value in config.items() if value and name not in _NOT_PART_OF_THE_FUNCTION}


def training_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an adapter that change its training alone, so that a resumed run may have others.

    Args:
        config: Plain config of the adapter.
    """
    # The trainer and the training set the last two.
    names = {"lora_dropout"} | _schedule_fields(config) - {"total_step", "rank_pattern"}
    return {name: config[name] for name in sorted(names) if name in config}


def _schedule_fields(config: Mapping[str, Any]) -> frozenset[str]:
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(config.get("peft_type"))
    return AdapterMethod.schedule_fields if kind is None else method_of.dispatch(kind)(None).schedule_fields
