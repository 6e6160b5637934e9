"""Portable optimizer states, which a run can load from any strategy and optimizer.

The form is that of ``torch.optim.Optimizer.state_dict()`` with full, plain tensors, and ``param_names`` beside ``params`` in
each group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_lora.errors import UserError

_CLASS = "tensor_class"
_KNOWN_PACKAGES = ("torchao",)


def make_portable(optimizer: Optimizer, module: nn.Module) -> None:
    """Make the optimizer's ``state_dict`` name its parameters, and its ``load_state_dict`` match them by name.

    Tensor subclasses, such as torchao's 8-bit tensors, are saved as the plain tensors that they consist of: Lightning loads a
    checkpoint with a map of devices, which ``torch.load`` refuses for such subclasses.

    Args:
        optimizer: Optimizer of some of the module's parameters; changed in place.
        module: Module that names the parameters.
    """
    names = parameter_names(optimizer, module)

    def saved(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        for group, group_names in zip(state["param_groups"], names, strict=True):
            group["param_names"] = group_names
        return {**state, "state": to_plain(state["state"])}

    def loaded(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        ordered = by_name(state, names)
        return {**ordered, "state": from_plain(ordered["state"])}

    optimizer.register_state_dict_post_hook(saved)
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:
        optimizer.register_load_state_dict_pre_hook(loaded)
    else:  # bitsandbytes overrides it without calling hooks
        load = optimizer.load_state_dict
        optimizer.load_state_dict = lambda state, *more, **options: load(loaded(optimizer, state), *more, **options)  # type: ignore[method-assign]


def parameter_names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """Names of the optimizer's parameters, group by group; empty for a parameter that the module does not have."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [[names.get(parameter, "") for parameter in group["params"]] for group in optimizer.param_groups]


def by_name(state: Mapping[str, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A saved optimizer state, reordered to these parameters.

    Args:
        state: Saved state; one without names is returned unchanged.
        names: Names of the optimizer's parameters, group by group.

    Raises:
        UserError: If the state belongs to other parameters.
    """
    saved_groups = state["param_groups"]
    if not all("param_names" in group for group in saved_groups):
        return dict(state)
    saved = {
        name: number
        for group in saved_groups
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    here = [name for group in names for name in group]
    if saved.keys() != set(here) or len(saved_groups) != len(names):
        other = sorted(saved.keys() ^ set(here))
        raise UserError(
            f"the checkpoint's optimizer has {len(saved)} parameters in {len(saved_groups)} groups, here are {len(here)} in "
            f"{len(names)}"
            + (f"; {other[0]} is only in one of them" if other else "")
            + ". Resume with the settings that "
            "the checkpoint was made with, or start without ckpt_path."
        )
    for number, (group, group_names) in enumerate(zip(saved_groups, names, strict=True)):
        if moved := sorted(set(group["param_names"]) ^ set(group_names)):
            raise UserError(
                f"{moved[0]} and {len(moved) - 1} other parameters are in another group than group {number} of the checkpoint's "
                f"optimizer. Resume with the groups that the checkpoint was made with, or start without ckpt_path."
            )
    places = {name: place for place, name in enumerate(here)}
    values = state["state"]
    # As PEFT's LoRA-FA has it.
    of_no_parameter = {key: value for key, value in values.items() if not isinstance(key, int)}
    groups, first = [], 0
    for group, group_names in zip(saved_groups, names, strict=True):
        options = {key: value for key, value in group.items() if key != "param_names"}
        groups.append({**options, "params": list(range(first, first + len(group_names)))})
        first += len(group_names)
    return {
        **state,
        "state": of_no_parameter | {places[name]: values[number] for name, number in saved.items() if number in values},
        "param_groups": groups,
    }


def to_plain(states: Any) -> Any:
    """The states with each tensor subclass of a known package as a dict of plain tensors."""

    def convert(value: Any) -> Any:
        if not (is_traceable_wrapper_subclass(value) and type(value).__module__.split(".")[0] in _KNOWN_PACKAGES):
            return value
        names, context = value.__tensor_flatten__()
        kind = type(value)
        return {
            _CLASS: f"{kind.__module__}.{kind.__qualname__}",
            "tensors": {name: getattr(value, name) for name in names},
            "context": context,
            "size": tuple(value.size()),
            "stride": tuple(value.stride()),
        }

    return map_states(states, convert)


def from_plain(states: Any) -> Any:
    """The states with the tensor subclasses that :func:`to_plain` took apart."""

    def convert(value: Any) -> Any:
        if not (isinstance(value, dict) and str(value.get(_CLASS, "")).split(".")[0] in _KNOWN_PACKAGES):
            return value
        module, _, name = value[_CLASS].rpartition(".")
        kind: Any = getattr(import_module(module), name)
        return kind.__tensor_unflatten__(value["tensors"], value["context"], value["size"], value["stride"])

    return map_states(states, convert)


def map_states(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Apply a conversion to every value in nested dicts and lists; converted values are not entered."""
    changed = convert(value)
    if changed is not value:
        return changed
    if isinstance(value, dict):
        return {key: map_states(entry, convert) for key, entry in value.items()}
    if isinstance(value, list):
        return [map_states(entry, convert) for entry in value]
    return value
