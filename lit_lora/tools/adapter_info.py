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
    from lit_lora.formats.find import open_adapter
    from lit_lora.tools.adapter_facts import as_json, as_lines
    from lit_lora.tools.adapter_input import read_input

    found, file = open_adapter(input)
    facts = describe(read_input(input, family), input)
    size = file.path.stat().st_size
    print(
        as_json(facts, file.path, found.name, size)
        if json
        else "\n".join(as_lines(facts, file.path, found.name, size, layers))
    )
