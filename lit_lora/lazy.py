"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


@cache
def public_names(package: str = "lit_lora") -> dict[str, str]:
    """The public names of a package, each with the module that defines it.

    Args:
        package: Name of the package; defaults to ``lit_lora``, which has all names.
    """
    listed = ast.parse(Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8")).body
    imports = [statement for statement in listed if isinstance(statement, ast.ImportFrom)]
    names = {alias.name: str(one.module) for one in imports for alias in one.names}
    return {name: module for name, module in names.items() if module.startswith(f"{package}.")}


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package, so that importing the package alone stays light.

    Args:
        package: Name of the package.
        modules: The module that defines each name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            # With name and obj Python suggests a name.
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        return getattr(import_module(modules[name]), name)

    return get
