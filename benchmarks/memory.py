"""Peak memory of a training step, setting by setting: ``python benchmarks/memory.py``.

A UNet of real size with random weights, trained for two steps (optimizer state exists from the second on) through the
Trainer on latents and text embeddings as a cache gives them, each setting in a fresh process. The first row is full
fine-tuning, a bare loop of plain diffusers and PyTorch; each later row changes what its name says.

On the CPU two figures are shown: the peak of the process' resident memory above what it had before the model was loaded,
the peak while loading included; and the model's tensors with the peak of torch's allocator in the steps, from a second
process, since watching the allocator takes memory too. On CUDA it is ``max_memory_allocated`` and ``max_memory_reserved``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "full fine-tuning, fp32": {"full": "float32"},
    "full fine-tuning, bf16 autocast": {"full": "bfloat16"},
    "LoRA r=16, fp32 base": {"base_dtype": "float32"},
    "LoRA, bf16 base": {},
    "LoRA, int8 base": {"quantization": "Int8"},
    "LoRA, fp8 base": {"quantization": "FP8"},
    "LoRA, nf4 base": {"quantization": "NF4"},
    "LoRA, bf16 base, checkpointing": {"gradient_checkpointing": True},
    "LoRA, int8 base, checkpointing": {"quantization": "Int8", "gradient_checkpointing": True},
    "LoRA, fp8 base, checkpointing": {"quantization": "FP8", "gradient_checkpointing": True},
    "LoRA, nf4 base, checkpointing": {"quantization": "NF4", "gradient_checkpointing": True},
    "... only down_blocks and up_blocks": {
        "quantization": "NF4",
        "gradient_checkpointing": ["*down_blocks.?", "*up_blocks.?"],
    },
    "... and 8-bit AdamW": {
        "quantization": "NF4",
        "gradient_checkpointing": True,
        "optimizer": "bitsandbytes.optim.AdamW8bit",
    },
    "... and optimizer in backward": {
        "quantization": "NF4",
        "gradient_checkpointing": True,
        "optimizer_in_backward": True,
    },
    "... and activations on the host": {
        "quantization": "NF4",
        "gradient_checkpointing": True,
        "offload_activations": True,
    },
    "... and blocks on the host": {"quantization": "NF4", "gradient_checkpointing": True, "offload_blocks": True},
    "with encoders: LoRA, bf16 base": {"encoders": True},
    "with encoders: and VAE tiling": {"encoders": True, "vae_tiling": True},
    "with encoders: on the host": {"encoders": True, "offload_encoders": True},
}
"""What each row changes. ``full`` is full fine-tuning; ``encoders`` trains from pictures and captions, without a cache."""

GPU_ROWS = ({"full": "bfloat16"}, {"encoders": True, "vae_tiling": True})
"""What is not measured on the CPU: as large as in float32 there, or of use only for large pictures."""

ON_THE_HOST = ("offload_activations", "offload_blocks", "offload_encoders")
"""What needs a device that is not the host."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", help="folder that keeps the models between runs; by default they are written anew")
    parser.add_argument("--only", nargs="*", help="parts of the names of the rows to measure")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--watch", choices=("process", "allocator"), default="process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(_measure(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.models = options.models or temporary
        _table(options)


def _table(options: argparse.Namespace) -> None:
    from real_models import write_pipeline

    write_pipeline(options.model, Path(options.models) / options.model, device=options.device)
    import bitsandbytes
    import diffusers
    import lightning
    import peft
    import torch

    print(
        f"{options.model} at {options.resolution} px, batch {options.batch_size}, {_device_name(options.device)}; torch"
        f" {torch.__version__}, lightning {lightning.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__},"
        f" bitsandbytes {bitsandbytes.__version__}"
    )
    first, second = ("resident GiB", "allocator GiB") if options.device == "cpu" else ("reserved GiB", "allocated GiB")
    print(f"{'':<40} {first:>13} {'less':>7} {second:>14} {'less':>7} {'s/step':>8}", flush=True)
    base: list[float] = []
    for name, row in ROWS.items():
        if options.only and not any(part in name for part in options.only):
            continue
        if options.device == "cpu" and (row in GPU_ROWS or any(row.get(key) for key in ON_THE_HOST)):
            continue
        if options.device == "cuda":
            found = _in_fresh_process(options, name, "process")
            if found is None:
                print(f"{name:<40} out of memory", flush=True)
                continue
            sizes, seconds = [found["reserved"], found["peak"]], found["seconds"]
        else:
            watched = [_in_fresh_process(options, name, what) for what in ("process", "allocator")]
            sizes, seconds = [one["peak"] for one in watched if one], watched[0]["seconds"] if watched[0] else 0.0
        base = base or sizes
        columns = [f"{size / 2**30:>13.2f} {1 - size / first:>7.1%}" for size, first in zip(sizes, base, strict=True)]
        print(f"{name:<40} {columns[0]}  {columns[1]} {seconds:>8.2f}", flush=True)


def _in_fresh_process(options: argparse.Namespace, row: str, watch: str) -> dict[str, float] | None:
    """What a row measured; None where the GPU has too little memory for it."""
    arguments = [
        f"--{key}={getattr(options, key.replace('-', '_'))}" for key in ("model", "resolution", "batch-size", "device")
    ]
    command = [sys.executable, __file__, *arguments, f"--models={options.models}", f"--row={row}", f"--watch={watch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        sys.exit(f"{row}: {done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(options: argparse.Namespace) -> dict[str, float]:
    """One row, in this process."""
    warnings.simplefilter("ignore")
    import torch

    import lit_lora.lightning_cli  # noqa: F401  all the libraries, before memory is counted

    row = ROWS[options.row]
    folder = Path(options.models) / options.model
    run = _full_fine_tuning if "full" in row else _adapter_training
    seconds: list[float] = []
    prepared = run(row, folder, options, seconds)
    if options.device == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
        prepared()
        peak = torch.cuda.max_memory_allocated()
        return {"peak": peak, "reserved": torch.cuda.max_memory_reserved(), "seconds": seconds[-1]}
    if options.watch == "allocator":
        prepared()
        return {"peak": _allocator_peaks[0], "seconds": seconds[-1]}
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    before = _status("VmRSS")
    prepared()
    return {"peak": _status("VmHWM") - before, "seconds": seconds[-1]}


_allocator_peaks: list[int] = []


@contextmanager
def _watched(options: argparse.Namespace, model: Any) -> Iterator[None]:
    """The steps of a loaded model."""
    if options.watch != "allocator" or options.device != "cpu":
        yield
        return
    from allocator import AllocatorPeak

    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with AllocatorPeak() as peak:
        yield
    _allocator_peaks.append(held + peak.bytes)


def _batch(options: argparse.Namespace, encoders: bool, device: str) -> dict[str, Any]:
    import torch

    count, size = options.batch_size, options.resolution
    batch: dict[str, Any] = {
        "caption": ["a photo of a cat"] * count,
        "target_size": torch.tensor([[size, size]] * count),
    }
    if encoders:
        return batch | {"pixel_values": torch.randint(256, (count, 3, size, size), dtype=torch.uint8)}
    width = {"sd15": 768, "sdxl": 2048}[options.model]
    text = {"encoder_hidden_states": torch.randn(count, 77, width)}
    if options.model == "sdxl":
        text["pooled"] = torch.randn(count, 1280)
    mean = torch.randn(count, 4, size // 8, size // 8)
    return batch | {"latents_mean": mean, "latents_std": torch.ones_like(mean), "text_embeddings": text}


def _full_fine_tuning(
    row: dict[str, Any], folder: Path, options: argparse.Namespace, seconds: list[float]
) -> Callable[[], None]:
    """The denoiser alone, all of it trained; what a cache gives is drawn at random."""

    def run() -> None:
        import torch
        import torch.nn.functional as F
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(options.device).train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6)
        batch = _batch(options, False, options.device)
        noisy = batch["latents_mean"].to(options.device)
        text = {name: value.to(options.device) for name, value in batch["text_embeddings"].items()}
        added = {}
        if "pooled" in text:
            ids = torch.zeros(len(noisy), 6, device=options.device)
            added = {"added_cond_kwargs": {"text_embeds": text["pooled"], "time_ids": ids}}
        timesteps = torch.full((len(noisy),), 500, device=options.device)
        with _watched(options, unet):
            for _ in range(2):
                started = time.perf_counter()
                with torch.autocast(options.device, torch.bfloat16, enabled=row["full"] == "bfloat16"):
                    prediction = unet(noisy, timesteps, text["encoder_hidden_states"], **added).sample
                F.mse_loss(prediction.float(), noisy).backward()
                optimizer.step()
                optimizer.zero_grad()
                if options.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)

    return run


def _adapter_training(
    row: dict[str, Any], folder: Path, options: argparse.Namespace, seconds: list[float]
) -> Callable[[], None]:
    def run() -> None:
        import torch
        from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
        from peft import LoraConfig

        import lit_lora.quantization
        from lit_lora import LoraDiffusion, MemoryOptions, StableDiffusion, StableDiffusionXL

        class Batches(LightningDataModule):
            cached = () if row.get("encoders") else ("latents", "text")

            def train_dataloader(self) -> Any:
                batch = _batch(options, bool(row.get("encoders")), options.device)
                return torch.utils.data.DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]

        class Seconds(Callback):
            def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                self.watched = _watched(options, pl_module)
                self.watched.__enter__()

            def on_train_end(self, *_: Any) -> None:
                self.watched.__exit__(None, None, None)

            def on_train_batch_start(self, *_: Any) -> None:
                self.started = time.perf_counter()

            def on_train_batch_end(self, *_: Any) -> None:
                if options.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - self.started)

        memory = {field.name for field in fields(MemoryOptions)}
        keys: dict[str, Any] = {key: value for key, value in row.items() if key not in memory | {"encoders"}}
        keys["memory"] = MemoryOptions(**{key: value for key, value in row.items() if key in memory})
        if "quantization" in keys:
            keys["quantization"] = getattr(lit_lora.quantization, keys["quantization"])()
        if "optimizer" in keys:
            module, _, name = keys["optimizer"].rpartition(".")
            keys["optimizer"] = getattr(__import__(module, fromlist=[name]), name)
        family = (StableDiffusion if options.model == "sd15" else StableDiffusionXL)(str(folder))
        model = LoraDiffusion(family, LoraConfig(r=16, lora_alpha=16), **keys)
        Trainer(
            accelerator="gpu" if options.device == "cuda" else "cpu",
            devices=1,
            max_steps=2,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Seconds()],
        ).fit(model, datamodule=Batches())

    return run


def _status(field: str) -> int:
    """Bytes, of this process."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:"))) * 1024


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


if __name__ == "__main__":
    main()
