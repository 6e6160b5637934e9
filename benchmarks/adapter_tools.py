"""Time and memory of ``lit-lora adapter resize`` and ``merge`` with adapters of FLUX.1's size.

    python -m benchmarks.adapter_tools --rank 64 --dtype float32

The adapters have random values and the layers that ``lit_lora.Flux`` adapts by default, or all Linear layers of the blocks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import nn

from lit_lora.adapters import plain_config
from lit_lora.families import Flux
from lit_lora.formats import AdapterFiles, write_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", choices=("default", "all"), default="default")
    parser.add_argument("--folder", default=None, help="folder for the adapters; a temporary one by default")
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
            # ["merge", one, two, "OUT", "--weights", "0.7", "0.3"],
            # ["merge", one, two, "OUT", "--weights", "0.7", "0.3", "--rank", str(arguments.rank)],
        ):
            measure(command, folder / "out")


def write_flux_adapter(folder: Path, rank: int, dtype: torch.dtype, layers: str, seed: int) -> None:
    """A LoRA of FLUX.1-dev with random values."""
    with torch.device("meta"):
        model = FluxTransformer2DModel()
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
    """Run a command of ``lit-lora adapter`` in a process of its own, and print its time and peak memory."""
    shutil.rmtree(out, ignore_errors=True)
    program = (
        "import json, resource, sys, time; start = time.perf_counter();"
        "from lit_lora.cli import main; status = main(sys.argv[1:]);"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024;"
        "print(json.dumps([status, time.perf_counter() - start, peak]))"
    )
    words = [str(out) if word == "OUT" else word for word in command]
    found = subprocess.run(
        [sys.executable, "-c", program, "adapter", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    status, seconds, peak = json.loads(found.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors")) if out.exists() else 0
    shown = " ".join(Path(word).name if "/" in word else word for word in command)
    print(
        f"{shown:55} status {status}  {seconds:5.1f} s  peak RSS {peak / 1e9:.2f} GB  written {size / 1e6:.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
