"""Saves what libraries do again and again: for a command's config jsonargparse reads the source of a class for each of its
parsers, makes a parser for each value of the class, and reads the source of all callers at each parsing; for each trainer
Lightning reads what all installed packages say of themselves.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

from jsonargparse import _common, _core, _signatures
from jsonargparse._typehints import ActionTypeHint
from lightning.fabric.utilities import registry


def read_classes_once() -> None:
    """Keep for the rest of the process what jsonargparse reads and makes of a class, and what packages register for trainers."""
    read, make_parser = _signatures.get_signature_parameters, ActionTypeHint.get_class_parser
    parsers: dict[Any, Any] = {}

    @cache
    def parameters(function_or_class: Any, method: str | None = None) -> tuple[Any, ...]:
        return tuple(read(function_or_class, method))

    def parser_of(val_class: Any, sub_add_kwargs: Any = None, skip_args: Any = None) -> Any:
        options = sub_add_kwargs or {}
        if skip_args or options.get("linked_targets") or _common.nested_links.get():  # these change options or parser
            return make_parser(val_class, sub_add_kwargs, skip_args)
        outer: Any = _common.parent_parser.get()
        plain = frozenset(
            (key, frozenset(value) if isinstance(value, set) else value) for key, value in options.items()
        )
        key = (val_class, plain, type(outer), outer.parser_mode, outer.logger)
        if key not in parsers:
            parsers[key] = make_parser(val_class, sub_add_kwargs)
        return parsers[key]

    def callers() -> list[tuple[Any]]:
        """The function that asks and the one that has called it, which is all that is looked at."""
        return [(sys._getframe(1),), (sys._getframe(2),)]

    _signatures.get_signature_parameters = lambda kind, method=None, logger=None: list(parameters(kind, method))
    ActionTypeHint.get_class_parser = staticmethod(parser_of)
    _core.inspect = SimpleNamespace(**vars(inspect) | {"stack": callers})
    registry.entry_points = cache(registry.entry_points)
