"""Tiny pipelines of families, one module for each: ``FAMILY``, and ``write(folder)``, which saves the pipeline and returns it.

Latents of 16 px images are 8 x 8, as :func:`tests.tiny_pipelines.tiny_vae` makes them. Every contract test finds the modules here
by itself, and the fixture ``NAME_folder`` writes the pipeline of the module ``NAME`` once in a session.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

MODULES: dict[str, ModuleType] = {
    info.name: import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)
}
"""The modules by name."""
