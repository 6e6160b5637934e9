"""Memory of each process under FSDP2 against that of a single one: ``python benchmarks/sharded_memory.py``.

A UNet of Stable Diffusion 1.5's size with random weights, loaded and trained for two steps (optimizer state exists from the
second on) through the Trainer on latents and text embeddings as a cache gives them: by one process without a strategy, then
by several with ``lit_lora_fsdp`` over gloo on the CPU, with the same global batch of a sample for each of them.

The figures are the peaks of a process' resident memory above what it had before the model was loaded, while loading and in
the two steps, as in ``benchmarks/memory.py``. The first process reads the files for all of them; each process is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BASES = ("Dense", "Int8", "NF4")
_SETTINGS = [(base, checkpointing) for base in BASES for checkpointing in (False, True)]
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
"""Has glibc give memory from this size on back as soon as it is freed. By itself it raises that bound to 32 MiB as it goes, and
what a block of that size or less leaves is kept: with one process and with several, but with several much more is freed."""
BOUND = 0.6
"""Largest share of a single process' peak that a process of two may have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--models", help="folder that keeps the model between runs; by default it is written anew")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=BASES)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one setting")
    parser.add_argument("--global-batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--base", choices=BASES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.base:
        print(json.dumps(_measure(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.models = options.models or temporary
        _table(options)


def _table(options: argparse.Namespace) -> None:
    from real_models import write_pipeline

    write_pipeline("sd15", Path(options.models) / "sd15")
    import diffusers
    import lightning
    import peft
    import torch

    print(
        f"sd15 at {options.resolution} px, global batch {options.processes}, LoRA r=16, bfloat16; {os.cpu_count()} CPU cores"
        f" ({platform.machine()}); torch {torch.__version__}, lightning {lightning.__version__}, diffusers"
        f" {diffusers.__version__}, peft {peft.__version__}\nMiB above the libraries, with freed memory given back at once"
        f" ({', '.join(f'{name}={value}' for name, value in _GIVE_BACK.items())});\nratio: of both peaks' larger one to that of"
        f" the single process, to be at most {BOUND}"
    )
    print(
        f"{'base':<6} {'checkpointing':<14} {'process':<10} {'loaded':>8} {'load peak':>10} {'step peak':>10} {'ratio':>6}"
    )
    for base, checkpointing in _SETTINGS:
        if base not in options.bases:
            continue
        single: dict[str, int] = {}
        for count in (1, options.processes):
            arguments = [__file__, f"--processes={count}", f"--resolution={options.resolution}", f"--base={base}"]
            arguments += [f"--global-batch={options.processes}", f"--models={options.models}"]
            arguments += [*(["--checkpointing"] if checkpointing else [])]
            for rank, found in enumerate(in_fresh_processes(arguments, count, options.timeout, _GIVE_BACK)):
                single = single or found
                name = "alone" if count == 1 else f"{rank} of {count}"
                sizes = "".join(
                    f" {found[key] / 2**20:>{w}.0f}" for key, w in (("loaded", 8), ("load", 10), ("steps", 10))
                )
                ratio = max(found["load"], found["steps"]) / max(single["load"], single["steps"])
                print(f"{base:<6} {'on' if checkpointing else 'off':<14} {name:<10}{sizes} {ratio:>6.2f}", flush=True)


def in_fresh_processes(
    arguments: Sequence[str], count: int, timeout: float, environment: Mapping[str, str] | None = None
) -> list[Any]:
    """Run Python with these arguments in so many processes, several as torchrun starts them; what each says in its last line.

    Args:
        arguments: The script and its own.
        count: How many processes.
        timeout: Seconds after which they are killed.
        environment: Further variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", **(environment or {})}
    if count > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
                with (
                    (Path(folder) / f"{rank}.out").open("wb") as output,
                    (Path(folder) / f"{rank}.err").open("wb") as errors,
                ):
                    command = [sys.executable, *arguments]
                    started.append(
                        subprocess.Popen(command, env=os.environ | shared | own, stdout=output, stderr=errors)
                    )
            end = time.monotonic() + timeout
            while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
                if time.monotonic() > end:
                    sys.exit(f"{' '.join(arguments)} took longer than {timeout:g} s")
                time.sleep(0.1)
        finally:
            for process in started:
                process.kill()
                process.wait()
        for rank, process in enumerate(started):
            if process.returncode > 0:
                sys.exit(f"{' '.join(arguments)}:\n{(Path(folder) / f'{rank}.err').read_text()[-3000:]}")
        outputs = [(Path(folder) / f"{rank}.out").read_text() for rank in range(count)]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def _measure(options: argparse.Namespace) -> dict[str, int]:
    """One setting, in this process: bytes."""
    warnings.simplefilter("ignore")
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from peft import LoraConfig

    import lit_lora.lightning_cli
    import lit_lora.quantization
    from lit_lora import LoraDiffusion, MemoryOptions, StableDiffusion

    class Batches(LightningDataModule):
        cached = ("latents", "text")

        def train_dataloader(self) -> Any:
            size = options.resolution
            count = options.global_batch // options.processes
            mean = torch.randn(count, 4, size // 8, size // 8)
            batch = {
                "caption": ["a photo of a cat"] * count,
                "target_size": torch.tensor([[size, size]] * count),
                "latents_mean": mean,
                "latents_std": torch.ones_like(mean),
                "text_embeddings": {"encoder_hidden_states": torch.randn(count, 77, 768)},
            }
            return torch.utils.data.DataLoader([batch] * 2 * options.processes, batch_size=None)  # type: ignore[arg-type]

    class Loading(Callback):
        def on_train_start(self, *_: Any) -> None:
            found["load"], found["loaded"] = _status("VmHWM") - before, _status("VmRSS") - before
            _forget_peak()

    found: dict[str, int] = {}
    model = LoraDiffusion(
        StableDiffusion(str(Path(options.models) / "sd15")),
        LoraConfig(r=16, lora_alpha=16),
        quantization=getattr(lit_lora.quantization, options.base)(),
        memory=MemoryOptions(gradient_checkpointing=options.checkpointing),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=options.processes,
        strategy="auto" if options.processes == 1 else "lit_lora_fsdp",
        max_steps=2,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Loading()],
    )
    _forget_peak()
    before = _status("VmRSS")
    trainer.fit(model, datamodule=Batches())
    found["steps"] = _status("VmHWM") - before
    return found


def _forget_peak() -> None:
    """Let the peak of resident memory start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    """Bytes, of this process."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:"))) * 1024


if __name__ == "__main__":
    main()
