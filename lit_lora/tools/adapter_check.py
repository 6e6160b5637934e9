"""``lit-lora adapter check``: checks an adapter against a base."""

from __future__ import annotations

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def check(input: str, base: str | None = None, family: str | None = None) -> None:  # noqa: A002
    """Check that an adapter fits a base; the exit status is 0 if it does, and 2 if not.

    Every tensor must belong to a layer of the base and have the right shape, values must be finite, and no rank may be above
    what the layer can use. Only the base's configs are read.

    Args:
        input: Adapter file (.safetensors), or folder with an adapter.
        base: Pipeline folder, folder of a model, hub id or embedded; defaults to the base that the adapter names.
        family: Model family of the base, such as StableDiffusionXL; defaults to the family that the input tells.

    Raises:
        UserError: If the adapter does not fit the base, or one of them cannot be read.
    """
    from lit_lora.adapter_tools.base_model import BaseModel
    from lit_lora.adapter_tools.check import check as check_adapter
    from lit_lora.adapter_tools.check import raise_problems
    from lit_lora.errors import UserError
    from lit_lora.tools.adapter_input import read_input
    from lit_lora.visible import visible

    adapter = read_input(input, family)
    name = base or adapter.base
    if not name:
        raise UserError(f"{input} does not tell its base; name one with --base: a folder, a hub id or 'embedded'")
    model = BaseModel(name)
    checked = check_adapter(adapter, input, model)
    raise_problems(checked, input, model)
    for part in checked:
        print(f"{part.name:16}  {part.tensors} tensors fit {part.model} of {visible(name)}")
        if part.unchecked:
            print(f"{'':16}  ({part.unchecked})")
