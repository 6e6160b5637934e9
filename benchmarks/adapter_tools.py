"""Time and memory of ``lit-lora adapter resize`` and ``merge`` with adapters of FLUX.1's size.

    python -m benchmarks.adapter_tools --rank 64 --dtype float32

The adapters have random values and the layers that ``lit_lora.Flux`` adapts by default, or all Linear layers of the blocks.
``--blocks N`` also merges an adapter of N double and 2 N single blocks into a base that has only these, in files of 2 GB.
Results: ``benchmarks/results/adapter_tools.txt``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import nn

from benchmarks.fresh_processes import result_of_process
from lit_lora.adapters import plain_config
from lit_lora.families import Flux
from lit_lora.formats import AdapterFiles, write_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", choices=("default", "all"), default="default")
    parser.add_argument("--folder", default=None, help="folder for the adapters; a temporary one by default")
    parser.add_argument("--blocks", type=int, default=0)
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        for number, name in enumerate(("one", "two")):
            write_flux_adapter(folder / name, arguments.rank, getattr(torch, arguments.dtype), arguments.layers, number)
        size = (folder / "one/adapter_model.safetensors").stat().st_size
        print(f"rank {arguments.rank}, {arguments.dtype}, {arguments.layers} layers: {size / 1e6:.0f} MB")
        one, two, half = str(folder / "one"), str(folder / "two"), arguments.rank // 2
        for command in (
            ["resize", one, "OUT", "--rank", str(half)],
            ["resize", one, "OUT", "--energy", "0.9"],
            ["resize", one, "OUT", "--size", f"{size // 2}"],
            ["merge", one, two, "OUT", "--weights", "0.7", "0.3"],
            ["merge", one, two, "OUT", "--weights", "0.7", "0.3", "--rank", str(arguments.rank)],
        ):
            measure(command, folder / "out")
        if arguments.blocks:
            merge_into_base(folder, arguments)


def merge_into_base(folder: Path, arguments: argparse.Namespace) -> None:
    """Merge an adapter into a base of a few blocks of FLUX.1's size, bfloat16."""
    sizes = {"num_layers": arguments.blocks, "num_single_layers": 2 * arguments.blocks}
    FluxTransformer2DModel(**sizes).bfloat16().save_pretrained(folder / "base", max_shard_size="2GB")
    size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    print(f"base of {arguments.blocks} double and {2 * arguments.blocks} single blocks: {size / 1e6:.0f} MB")
    dtype = getattr(torch, arguments.dtype)
    write_flux_adapter(folder / "small", arguments.rank, dtype, arguments.layers, 2, **sizes)
    measure(["merge", str(folder / "small"), "OUT", "--into", str(folder / "base")], folder / "out")


def write_flux_adapter(folder: Path, rank: int, dtype: torch.dtype, layers: str, seed: int, **sizes: int) -> None:
    """A LoRA of FLUX.1-dev with random values."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**sizes)
    ends = (*Flux.default_targets, "proj_mlp", "proj_out", "norm.linear", "norm1.linear", "norm1_context.linear")
    if layers == "default":
        ends = Flux.default_targets
    adapted = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "blocks" in name and name.endswith(tuple(f".{end}" for end in ends))
    }
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in adapted.items():
        down = torch.randn(rank, layer.in_features, generator=generator) / 100
        up = torch.randn(layer.out_features, rank, generator=generator) / 100
        # Singular values fall as those of trained adapters do.
        down *= torch.logspace(0, -2, rank)[:, None]
        state |= {
            f"base_model.model.{name}.lora_A.weight": down.to(dtype),
            f"base_model.model.{name}.lora_B.weight": up.to(dtype),
        }
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(adapted))
    plain = plain_config(config) | {"base_model_name_or_path": "black-forest-labs/FLUX.1-dev"}
    folder.mkdir()
    write_adapter(AdapterFiles(state, plain, family=Flux), folder)


def measure(command: list[str], out: Path) -> None:
    """Run a command of ``lit-lora adapter`` in a process of its own, and print its time, CPU time and peak memory."""
    shutil.rmtree(out, ignore_errors=True)
    program = (
        "import json, sys, time; start = time.perf_counter();"
        "from benchmarks.process_memory import peak_resident; from lit_lora.cli import main;"
        "status = main(sys.argv[1:]); status and sys.exit(status);"
        "print(json.dumps([time.perf_counter() - start, time.process_time(), peak_resident()]))"
    )
    words = [str(out) if word == "OUT" else word for word in command]
    seconds, cpu_seconds, peak = result_of_process(["-c", program, "adapter", *words])
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors")) if out.exists() else 0
    shown = " ".join(Path(word).name if "/" in word else word for word in command)
    print(
        f"{shown:55} {seconds:5.1f} s  CPU {cpu_seconds:5.1f} s  peak RSS {peak / 1e9:.2f} GB  written {size / 1e6:.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
