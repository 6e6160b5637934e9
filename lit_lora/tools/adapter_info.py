"""``lit-lora adapter info``: says what an adapter is."""

from __future__ import annotations

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def info(input: str, layers: bool = False, json: bool = False, family: str | None = None) -> None:  # noqa: A002
    """Say what an adapter is: method, base, format, ranks, sizes, norms and metadata.

    Args:
        input: Adapter file (.safetensors), or folder with an adapter.
        layers: Whether to list every layer instead of one line for all layers of a kind.
        json: Whether to print all of it as JSON, for programs.
        family: Model family of the base, such as StableDiffusionXL; defaults to the family that the input tells.

    Raises:
        UserError: If the input holds no complete adapter.
    """
    from lit_lora.adapter_tools.describe import describe
    from lit_lora.formats.find import adapter_files
    from lit_lora.tools.adapter_facts import as_json, as_lines
    from lit_lora.tools.adapter_input import read_input

    name, files = adapter_files(input)
    facts = describe(read_input(input, family), input)
    size = sum(file.stat().st_size for file in files)
    print(as_json(facts, files[0], name, size) if json else "\n".join(as_lines(facts, files[0], name, size, layers)))
