"""``lit-lora adapter convert``: writes an adapter in another file format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_lora.errors import UserError

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


Format = Literal["peft", "diffusers", "kohya", "comfyui", "lycoris"]
"""Names of the formats in ``lit_lora.formats.FORMATS``."""


def convert(
    input: str,  # noqa: A002
    output: str,
    format: Format = "peft",  # noqa: A002
    family: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter in another file format; that of the input is found from the names of its tensors.

    Args:
        input: Adapter file (.safetensors), or folder with an adapter.
        output: File to write, with the ending .safetensors, or folder for the format's files.
        format: Format to write; defaults to peft.
        family: Model family of the base, such as StableDiffusionXL or my_package.MyFamily; defaults to the family that the
            input tells.
        overwrite: Whether to replace an existing output.

    Raises:
        UserError: If the input holds no complete adapter, the format cannot hold it, or the output cannot be written.
    """
    from lit_lora.files import atomic_folder
    from lit_lora.formats import format_named, write_embeddings
    from lit_lora.tools.adapter_input import read_input
    from lit_lora.tools.adapter_output import check_free, check_target, is_file, write_file

    target, written = Path(output), format_named(format)
    check_free(target, overwrite)
    check_target(target, format)
    adapter = read_input(input, family)
    if reason := written.why_not(adapter):
        advice = "; set --family to the family of its base" if adapter.family is None else ""
        raise UserError(f"{input} cannot be written in the format {format}: {reason}{advice}")
    if is_file(target):
        write_file(adapter, written, target)
    else:
        with atomic_folder(target, marker=written.file_name) as part:
            written.write(adapter, part)
            write_embeddings(adapter, part)
    print(f"{format}: {target}")
