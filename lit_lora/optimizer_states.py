"""States of optimizers that keep tensors of a class of their own, as torchao's in eight bits, in plain tensors.

Lightning reads a checkpoint with a map of devices, which ``torch.load`` refuses for such tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_CLASS = "tensor_class"
_KNOWN_PACKAGES = ("torchao",)


def to_plain(states: list[Any]) -> list[Any]:
    """The states with each such tensor as a dict of what it is made of."""

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

    converted: list[Any] = _map(states, convert)
    return converted


def from_plain(states: list[Any]) -> list[Any]:
    """The states as the optimizer knows them."""

    def convert(value: Any) -> Any:
        if not (isinstance(value, dict) and str(value.get(_CLASS, "")).split(".")[0] in _KNOWN_PACKAGES):
            return value
        module, _, name = value[_CLASS].rpartition(".")
        kind: Any = getattr(import_module(module), name)
        return kind.__tensor_unflatten__(value["tensors"], value["context"], value["size"], value["stride"])

    converted: list[Any] = _map(states, convert)
    return converted


def _map(value: Any, convert: Callable[[Any], Any]) -> Any:
    """All values inside, those that a conversion made not entered again."""
    changed = convert(value)
    if changed is not value:
        return changed
    if isinstance(value, dict):
        return {key: _map(entry, convert) for key, entry in value.items()}
    if isinstance(value, list):
        return [_map(entry, convert) for entry in value]
    return value
