"""``lit-lora adapter merge``: merges adapters into one, or into their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lit_lora.errors import UserError, check_exclusive
from lit_lora.tools.adapter_convert import Format

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def merge(
    adapters: list[str],
    output: str,
    weights: list[float] | None = None,
    into: str | None = None,
    rank: int | None = None,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    format: Format | None = None,  # noqa: A002
    family: str | None = None,
    denoiser_only: bool = False,
    variant: str | None = None,
    overwrite: bool = False,
) -> None:
    """Merge adapters into one, or with --into into their base.

    Several LoRAs are merged by concatenating their factors, which is exact and adds their ranks, or to a lower rank by a
    singular value decomposition. A base is read and written one weight at a time.

    Args:
        adapters: Adapter files (.safetensors) or folders, separated by spaces.
        output: File to write, with the ending .safetensors, or folder.
        weights: Factor of each adapter, such as 0.7 0.3; defaults to 1 for each.
        into: Base to merge into: a pipeline folder or a model's folder that diffusers' save_pretrained wrote, a hub id, or
            embedded; defaults to none, so that the output is an adapter.
        rank: Maximum rank of each layer; defaults to the sum of the ranks.
        base: Name of the base of all adapters, where their files name it differently or not at all.
        dtype: dtype of the merged adapter; defaults to the widest of the adapters' dtypes.
        format: Format to write; defaults to PEFT's and diffusers' files in a folder, and to diffusers' for a file.
        family: Model family of the base, such as StableDiffusionXL; defaults to the family that the adapters tell.
        denoiser_only: Whether to write only the merged denoiser's folder instead of the whole pipeline.
        variant: Variant of the base's weight files, such as fp16; defaults to the files without a variant, or else to the
            only variant that a part has.
        overwrite: Whether to replace an existing output.

    Raises:
        UserError: If the adapters cannot be merged, do not fit the base, or the output cannot be written.
    """
    from lit_lora.adapter_tools.named_adapter import NamedAdapter
    from lit_lora.tools.adapter_input import read_input
    from lit_lora.tools.adapter_output import AdapterOutput

    weights = weights or [1.0] * len(adapters)
    if len(weights) != len(adapters) or not adapters:
        raise UserError(
            f"{len(adapters)} adapters and {len(weights)} weights were given; give one weight for each adapter"
        )
    for name, value in (("rank", rank), ("format", format), ("dtype", dtype)):
        check_exclusive(**{"into": into, name: value})
    written = AdapterOutput(Path(output), format, overwrite)  # checks it before any work
    named = [NamedAdapter(path, read_input(path, family), one) for path, one in zip(adapters, weights, strict=True)]
    if into is None:
        _into_one(named, written, rank, base, dtype)
    else:
        _into_base(named, into, written.target, base, denoiser_only, variant)


def _into_one(named: list[Any], written: Any, rank: int | None, base: str | None, dtype: str | None) -> None:
    """Merge adapters into one and write it."""
    import torch

    from lit_lora.adapter_tools.merge import merge as merge_adapters
    from lit_lora.mapped import keep_on_disk
    from lit_lora.tools.adapter_screen import merged_lines

    keep = keep_on_disk(written.target.parent)
    merged = merge_adapters(named, rank, base, None if dtype is None else getattr(torch, dtype), keep)
    written.write(merged)
    print("\n".join(merged_lines(named, merged, written.target)))


def _into_base(
    named: list[Any],
    into: str,
    target: Path,
    base_name: str | None,
    denoiser_only: bool,
    variant: str | None,
) -> None:
    """Merge adapters into their base and write it."""
    from lit_lora.adapter_tools.base_model import BaseModel
    from lit_lora.adapter_tools.merge import merge as merge_adapters
    from lit_lora.adapter_tools.merge_base import check_base, marker, merge_base
    from lit_lora.files import atomic_folder
    from lit_lora.mapped import keep_on_disk
    from lit_lora.visible import visible

    base = BaseModel(into, weights=True, variant=variant)
    for one in named:
        check_base(one.adapter, one.path, base)
    single = len(named) == 1 and named[0].weight == 1
    keep = keep_on_disk(target.parent)
    adapter = named[0].adapter if single else merge_adapters(named, base=base_name, keep=keep)
    paths = " + ".join(one.path for one in named)
    with atomic_folder(target, marker=marker(base, denoiser_only)) as part:
        merged = merge_base(adapter, paths, base, part, denoiser_only)
    for name, count in merged.layers.items():
        print(f"{name:16}  {count} weights changed")
    print(f"written           {visible(target)}")
