"""``lit-lora adapter diff``: compares two adapters."""

from __future__ import annotations

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def diff(first: str, second: str, layers: bool = False, json: bool = False, family: str | None = None) -> None:
    """Compare two adapters: settings, layers that only one has, and the distance of the layers' updates.

    The distance is that of the updates as a share of the first one's norm, whatever the ranks and scales.

    Args:
        first: Adapter file (.safetensors), or folder with an adapter.
        second: Adapter to compare with it.
        layers: Whether to list every layer instead of one line for all layers of a kind.
        json: Whether to print JSON, with every layer, for programs.
        family: Model family of the base, such as StableDiffusionXL; defaults to the family that the adapters tell.

    Raises:
        UserError: If one holds no complete adapter, or they are of different methods or models.
    """
    from lit_lora.adapter_tools.compare import compare
    from lit_lora.tools.adapter_differences import as_json, as_lines
    from lit_lora.tools.adapter_input import read_input

    found = compare(read_input(first, family), read_input(second, family), (first, second))
    print(as_json(found) if json else "\n".join(as_lines(found, layers)))
