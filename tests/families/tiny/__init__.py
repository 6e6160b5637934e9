"""Tiny pipelines of families, one module for each: ``FAMILY``, and ``write(folder)``, which saves the pipeline and returns it.

Latents of 16 px images are 8 x 8, as :func:`tests.tiny_pipelines.tiny_vae` makes them. Every contract test finds the modules here
by itself, and the fixture ``NAME_folder`` writes the pipeline of the module ``NAME`` once in a session. A family whose models
have other pipelines or text encoders names them in ``OPTIONS``: options of ``write`` by the name of a variant, which the fixture
``NAME_VARIANT_folder`` writes.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any

MODULES: dict[str, ModuleType] = {
    info.name: import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)
}
"""The modules by name."""

VARIANTS: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    f"{name}_{variant}": (module, options)
    for name, module in MODULES.items()
    for variant, options in getattr(module, "OPTIONS", {}).items()
}
"""Modules, and options of ``write``, by the names of variants."""
