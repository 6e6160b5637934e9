"""Texts of settings, by which runs are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch


def described(value: Any) -> str:
    """A text that is equal for equal settings: for objects, their class with the options of its constructor."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if value is None or isinstance(value, str | bool | int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {described(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    options = ", ".join(f"{name}={text}" for name, text in described_options(value))
    return f"{type(value).__name__}({options})" if options else type(value).__name__


def described_options(value: Any, without: type[Any] = object) -> Iterator[tuple[str, str]]:
    """Names and texts of the options of an object's constructor that it keeps under their names.

    An object whose options name files may have a method ``described_contents``, which gives names and texts of what they hold.

    Args:
        value: Object.
        without: Class whose options are left out.
    """
    left_out = signature(without.__init__).parameters
    for name in signature(type(value).__init__).parameters:
        if hasattr(value, name) and name not in left_out:
            yield name, described(getattr(value, name))
    yield from getattr(value, "described_contents", dict)().items()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Names with both texts where these differ; what only one of them names is not compared."""
    for name in before:
        if name in now and before[name] != now[name]:
            yield name, before[name], now[name]
