"""Finds the model family of an adapter that does not tell it, by the names of its layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, families
from lit_lora.formats.layer_names import places
from lit_lora.formats.tensor_file import TensorFile
from lit_lora.visible import visible

_TELLING = (("modelspec.architecture", "ss_base_model_version"), ("modelspec.implementation",))
"""Metadata that tell the family: the first name one model, the last all models of one code."""


def families_with(names: Collection[str], metadata: Mapping[str, str]) -> list[type[ModelFamily]]:
    """The families whose published models have layers of all these names; subclasses of such a family are left out.

    Args:
        names: Names of layers, as any tool writes them.
        metadata: Metadata of the file, which decide where several families have all names.
    """
    wanted = set(names)
    found = [kind for kind in families() if places(kind, {}).keys() >= wanted]
    found = [kind for kind in found if not any(kind is not other and issubclass(kind, other) for other in found)]
    for keys in _TELLING if len(found) > 1 else ():
        told = {metadata.get(key, "").removesuffix("/lora") for key in keys}
        if fitting := [kind for kind in found if told & set(kind.model_spec({}).values())]:
            return fitting
    return found


def family_of_names(names: Collection[str], file: TensorFile) -> type[ModelFamily]:
    """The one family of :func:`families_with`.

    Args:
        names: Names of layers, as any tool writes them.
        file: The file that holds them.

    Raises:
        UserError: If no family has all names, or several have.
    """
    found = families_with(names, file.metadata)
    if len(found) == 1:
        return found[0]
    advice = "set the family of its base"
    if found:
        raise UserError(f"{file.path} may be an adapter of {' or '.join(kind.__name__ for kind in found)}; {advice}")
    known = ", ".join(kind.__name__ for kind in families() if places(kind, {}))
    raise UserError(
        f"{file.path} is no adapter of a known family ({known}): none has all its layers, such as "
        f"{visible(min(names), 80)}; {advice}"
    )
