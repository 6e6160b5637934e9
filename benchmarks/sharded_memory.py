"""Memory of each process under FSDP2 compared with a single process: ``python benchmarks/sharded_memory.py``.

A UNet of Stable Diffusion 1.5's size with random weights is loaded and trained for two steps (optimizer state exists from the
second step on) through the Trainer, on latents and text embeddings as a cache provides them. First one process trains without a
strategy, then several processes with ``lit_lora_fsdp`` over gloo on the CPU. The global batch is the same, one sample for each of
the several processes.

The figures are the peaks of each process' resident memory while loading and in the two steps, less its resident memory before
the model is loaded, as in ``benchmarks/memory.py``. The first process reads the files for all processes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from environment import cpu_cores, versions
from fresh_processes import results_of_processes
from process_memory import peak_resident, reset_peak, resident

BASES = ("Dense", "Int8", "NF4")
_SETTINGS = [(base, checkpointing) for base in BASES for checkpointing in (False, True)]
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
"""Makes glibc return blocks of this size and more to the system as soon as they are freed. By default it raises this threshold
up to 32 MiB while the process runs and keeps freed blocks below it, most of all in several processes, which free more."""
BOUND = 0.6
"""Largest acceptable ratio of the peak of one of two processes to the peak of a single process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--models", help="folder that keeps the model between runs; defaults to a temporary folder")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=BASES)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds that a setting may take")
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
    print(
        f"sd15 at {options.resolution} px, global batch {options.processes}, LoRA r=16, bfloat16; {cpu_cores()};"
        f" {versions('torch', 'lightning', 'diffusers', 'peft')}\nMiB above the loaded libraries; freed memory is returned at"
        f" once ({', '.join(f'{name}={value}' for name, value in _GIVE_BACK.items())});\nratio: larger of both peaks to that of"
        f" the single process, at most {BOUND}"
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
            for rank, found in enumerate(results_of_processes(arguments, count, options.timeout, _GIVE_BACK)):
                single = single or found
                name = "alone" if count == 1 else f"{rank} of {count}"
                sizes = "".join(
                    f" {found[key] / 2**20:>{w}.0f}" for key, w in (("loaded", 8), ("load", 10), ("steps", 10))
                )
                ratio = max(found["load"], found["steps"]) / max(single["load"], single["steps"])
                print(f"{base:<6} {'on' if checkpointing else 'off':<14} {name:<10}{sizes} {ratio:>6.2f}", flush=True)


def _measure(options: argparse.Namespace) -> dict[str, int]:
    """Measure one setting in this process; all figures are bytes."""
    warnings.simplefilter("ignore")
    from lightning.pytorch import Callback
    from peft import LoraConfig
    from short_training import RepeatedBatch, cached_batch, plain_trainer

    import lit_lora.lightning_cli  # imports all libraries before memory is measured
    import lit_lora.quantization
    from lit_lora import LoraDiffusion, MemoryOptions, StableDiffusion

    class Loading(Callback):
        def on_train_start(self, *_: Any) -> None:
            found["load"], found["loaded"] = peak_resident() - before, resident() - before
            reset_peak()

    found: dict[str, int] = {}
    model = LoraDiffusion(
        StableDiffusion(str(Path(options.models) / "sd15")),
        LoraConfig(r=16, lora_alpha=16),
        quantization=getattr(lit_lora.quantization, options.base)(),
        memory=MemoryOptions(gradient_checkpointing=options.checkpointing),
    )
    trainer = plain_trainer(
        devices=options.processes,
        strategy="auto" if options.processes == 1 else "lit_lora_fsdp",
        max_steps=2,
        callbacks=[Loading()],
    )
    batch = cached_batch(options.global_batch // options.processes, options.resolution)
    reset_peak()
    before = resident()
    trainer.fit(model, datamodule=RepeatedBatch(batch, 2 * options.processes))
    found["steps"] = peak_resident() - before
    return found


if __name__ == "__main__":
    main()
