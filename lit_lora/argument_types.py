"""Checks of constructor arguments against their annotations, for callers from Python: the command line checks them itself."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import os
import sys
import types
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from reprlib import repr as short
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from lit_lora.errors import UserError

_SEQUENCES = (list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


def check_types(owner: type[object], values: Mapping[str, object]) -> None:
    """Refuse arguments that are not what a constructor's annotations say, such as the text "false" for a bool.

    Numbers are finite, and may be those of numpy; a tuple is a list, and a path is a text. What only type checkers can resolve
    is not checked.

    Args:
        owner: The class.
        values: Arguments by name, such as the constructor's ``locals()``; other names are left alone.

    Raises:
        UserError: If an argument is of another type.
    """
    for name, hint in _hints(owner).items():  # type: ignore[arg-type]  # mypy takes no class for hashable
        if name in values and not _fits(values[name], hint):
            raise UserError(
                f"{name}={_shown(values[name])} is {_problem(values[name], hint)}; write {_described(hint)}"
            )


@cache
def _hints(owner: type[object]) -> dict[str, Any]:
    """The annotations of a constructor's arguments, without those whose names are unknown when the program runs."""
    if dataclasses.is_dataclass(owner):
        sources = [
            (inspect.get_annotations(base), vars(sys.modules[base.__module__])) for base in reversed(owner.__mro__)
        ]
    else:
        init: Any = owner.__init__
        sources = [(init.__annotations__, init.__globals__)]
    hints = {}
    for stated, known in sources:
        for argument, hint in stated.items():
            try:
                hints[argument] = eval(hint, dict(known)) if isinstance(hint, str) else hint
            except (NameError, AttributeError):  # imported for type checkers alone
                hints.pop(argument, None)
    return hints


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in _SEQUENCES:
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return is_list and all(_fits(one, arguments[0]) for one in value)
    if origin in _MAPPINGS:
        return isinstance(value, Mapping) and all(_fits(one, arguments[1]) for one in value.values())
    if origin is tuple and ... not in arguments:
        is_such = isinstance(value, Sequence) and len(value) == len(arguments)
        return is_such and all(map(_fits, value, arguments))
    if hint in (None, type(None)):
        return value is None
    if hint in _PLAIN:
        is_such = isinstance(value, _PLAIN[hint][0]) and (hint is bool or not isinstance(value, bool))
        return is_such and (not isinstance(value, float | np.floating) or math.isfinite(value))
    if isinstance(hint, type) and hint is not Any and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True


_PLAIN: dict[Any, tuple[tuple[type[Any], ...], str]] = {
    bool: ((bool, np.bool_), "True or False"),
    int: ((Integral,), "a whole number"),
    float: ((Real,), "a finite number"),
    str: ((str, os.PathLike), "a text"),
}


def _described(hint: Any) -> str:
    """What an annotation asks for, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in arguments)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin in _SEQUENCES:
        return f"a list, each item {_described(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} values, each {_described(arguments[0])}"
    if origin in _MAPPINGS:
        return f"a dict, each value {_described(arguments[1])}"
    if hint in (None, type(None)):
        return "None"
    if hint in _PLAIN:
        return _PLAIN[hint][1]
    return f"an object of {getattr(hint, '__name__', hint)}"


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else short(value)


def _problem(value: object, hint: Any) -> str:
    if isinstance(value, type):
        return "no object"
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        return "not finite"
    is_choice = any(get_origin(one) is Literal for one in (hint, *get_args(hint)))
    return "unknown" if is_choice and isinstance(value, str) else f"a {type(value).__name__}"
