"""``lit-lora adapter extract``: makes an adapter of the difference of two models."""

from __future__ import annotations

from pathlib import Path

from lit_lora.tools.adapter_convert import Format

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def extract(
    tuned: str,
    base: str,
    output: str,
    rank: int | None = None,
    energy: float | None = None,
    size: str | None = None,
    max_rank: int = 128,
    format: Format | None = None,  # noqa: A002
    variant: str | None = None,
    overwrite: bool = False,
    layers: bool = False,
) -> None:
    """Make a LoRA of the difference between a fine-tuned model and its base.

    The weights of the denoiser's Linear and Conv2d layers are read one at a time. Give one of --rank, --energy and --size.

    Args:
        tuned: Fine-tuned model: a pipeline folder, folder of a model or hub id, or a safetensors file.
        base: Base that it was made of, likewise.
        output: File to write, with the ending .safetensors, or folder.
        rank: Rank of each layer; a smaller layer has the highest rank that it can have.
        energy: Share of the energy of each layer's difference (sum of squared singular values) to keep, such as 0.95.
        size: Maximum size of each written file of tensors, such as 200MB; shared among all layers by their singular values.
        max_rank: Maximum rank for --energy and --size.
        format: Format to write; defaults to PEFT's and diffusers' files in a folder, and to diffusers' for a file.
        variant: Variant of the weight files of both models, such as fp16; defaults to the files without a variant, or else to the
            only variant that a part has.
        overwrite: Whether to replace an existing output.
        layers: Whether to list every layer instead of one line for all layers of a kind.

    Raises:
        UserError: If the models cannot be read or compared, the size is too small, or the output cannot be written.
    """
    from lit_lora.adapter_tools.budget import Budget
    from lit_lora.adapter_tools.extract import ModelWeights
    from lit_lora.adapter_tools.extract import extract as extract_adapter
    from lit_lora.byte_sizes import parse_bytes
    from lit_lora.tools.adapter_output import AdapterOutput
    from lit_lora.tools.adapter_screen import extracted_lines

    budget = Budget(rank, energy, None if size is None else parse_bytes("size", size))
    written = AdapterOutput(Path(output), format, overwrite)
    weights = ModelWeights(tuned, variant), ModelWeights(base, variant)
    extracted = extract_adapter(*weights, budget, max_rank, written.size)
    written.write(extracted.adapter)
    print("\n".join(extracted_lines(extracted, written.target, layers)))
