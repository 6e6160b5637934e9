"""``lit-lora adapter resize``: lowers the ranks of an adapter."""

from __future__ import annotations

from pathlib import Path

from lit_lora.tools.adapter_convert import Format

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def resize(
    input: str,  # noqa: A002
    output: str,
    rank: int | None = None,
    energy: float | None = None,
    size: str | None = None,
    format: Format | None = None,  # noqa: A002
    family: str | None = None,
    overwrite: bool = False,
    layers: bool = False,
) -> None:
    """Lower the ranks of a LoRA or DoRA, layer by layer, with the least loss.

    Give one of --rank, --energy and --size.

    Args:
        input: Adapter file (.safetensors), or folder with an adapter.
        output: File to write, with the ending .safetensors, or folder.
        rank: Maximum rank of each layer.
        energy: Share of each layer's energy (sum of squared singular values) to keep, such as 0.95; a layer gets the lowest
            rank that keeps it.
        size: Maximum size of each written file of tensors, such as 20MB; shared among all layers by their singular values.
        format: Format to write; defaults to PEFT's and diffusers' files in a folder, and to diffusers' for a file.
        family: Model family of the base, such as StableDiffusionXL; defaults to the family that the input tells.
        overwrite: Whether to replace an existing output.
        layers: Whether to list every layer instead of one line for all layers of a kind.

    Raises:
        UserError: If the input is no LoRA or DoRA, the ranks would rise, the size is too small, or the output cannot be written.
    """
    from lit_lora.adapter_tools.budget import Budget
    from lit_lora.adapter_tools.resize import resize as resize_adapter
    from lit_lora.byte_sizes import parse_bytes
    from lit_lora.mapped import keep_on_disk
    from lit_lora.tools.adapter_input import read_input
    from lit_lora.tools.adapter_output import AdapterOutput
    from lit_lora.tools.adapter_screen import resized_lines

    budget = Budget(rank, energy, None if size is None else parse_bytes("size", size))
    written = AdapterOutput(Path(output), format, overwrite)
    adapter = read_input(input, family)
    resized = resize_adapter(adapter, input, budget, written.size, keep_on_disk(written.target.parent))
    written.write(resized.adapter)
    print("\n".join(resized_lines(resized, written.target, layers)))
