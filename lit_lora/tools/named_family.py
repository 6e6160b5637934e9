"""Finds the model family that an option names."""

from __future__ import annotations

from importlib import import_module

import lit_lora
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.lazy import public_names


def named_family(family: str) -> type[ModelFamily]:
    """The model family of a name, such as ``StableDiffusion``, or of an import path, such as ``my_package.MyFamily``.

    Raises:
        UserError: If there is no such class, or it is no model family.
    """
    path, _, name = family.rpartition(".")
    try:
        kind = getattr(import_module(path) if path else lit_lora, name)
    except (ImportError, AttributeError) as error:
        known = ", ".join(
            one for one, module in public_names().items() if "families" in module and one != "ModelFamily"
        )
        raise UserError(
            f"family={family!r} cannot be imported: {error}; choose from {known}, or give the import path of your own class"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, ModelFamily)):
        raise UserError(f"family={family!r} is not a subclass of lit_lora.ModelFamily")
    return kind
