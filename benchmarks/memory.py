"""Peak memory of a training step with different settings: ``python benchmarks/memory.py``.

A UNet of real size with random weights is trained for two steps (optimizer state exists from the second step on) through the
Trainer, on latents and text embeddings as a cache provides them, each setting in a fresh process. The first row is full
fine-tuning in a bare loop of plain diffusers and PyTorch; the name of each later row says what it changes.

On the CPU there are two figures. The first is the peak of the process' resident memory, loading included, less its resident
memory before the model is loaded. The second is the size of the model's tensors plus the peak of torch's allocator in the steps;
it comes from a second process, because recording allocations takes memory too. On CUDA the figures are
``max_memory_reserved`` and ``max_memory_allocated``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environment import cpu_cores, versions
from fresh_processes import result_of_process
from process_memory import peak_resident, reset_peak, resident
from selection import selected

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
"""Settings of each row: ``full`` is the dtype of full fine-tuning, ``encoders`` trains on images and captions without a cache;
the others are arguments of ``LoraDiffusion`` and ``MemoryOptions``."""

GPU_ROWS = ({"full": "bfloat16"}, {"encoders": True, "vae_tiling": True})
"""Rows that are not measured on the CPU: autocast needs as much memory as float32 there, and tiling helps only with large
images."""

ON_THE_HOST = ("offload_activations", "offload_blocks", "offload_encoders")
"""Settings that need a device other than the host."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", help="folder that keeps the models between runs; defaults to a temporary folder")
    parser.add_argument("--only", nargs="*", help="names of rows to measure, or parts of them")
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
    print(
        f"{options.model} at {options.resolution} px, batch {options.batch_size}, {_device_name(options.device)};"
        f" {versions('torch', 'lightning', 'diffusers', 'peft', 'bitsandbytes')}"
    )
    first, second = ("resident GiB", "allocator GiB") if options.device == "cpu" else ("reserved GiB", "allocated GiB")
    print(f"{'':<40} {first:>13} {'less':>7} {second:>14} {'less':>7} {'s/step':>8}", flush=True)
    base: list[float] = []
    for name in selected(ROWS, options.only):
        row = ROWS[name]
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
    """Measure a row in a fresh process; returns None if the GPU has too little memory."""
    arguments = [
        f"--{key}={getattr(options, key.replace('-', '_'))}" for key in ("model", "resolution", "batch-size", "device")
    ]
    arguments += [f"--models={options.models}", f"--row={row}", f"--watch={watch}"]
    try:
        result: dict[str, float] = result_of_process([__file__, *arguments])
    except RuntimeError as error:
        if "OutOfMemoryError" in str(error):
            return None
        raise
    return result


def _measure(options: argparse.Namespace) -> dict[str, float]:
    """Measure one row in this process."""
    warnings.simplefilter("ignore")
    import torch

    import lit_lora.lightning_cli  # noqa: F401  imports all libraries before memory is measured

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
    reset_peak()
    before = resident()
    prepared()
    return {"peak": peak_resident() - before, "seconds": seconds[-1]}


_allocator_peaks: list[int] = []


@contextmanager
def _watched(options: argparse.Namespace, model: Any) -> Iterator[None]:
    """Record the allocator's peak in the steps of a loaded model, if it is to be measured."""
    if options.watch != "allocator" or options.device != "cpu":
        yield
        return
    from allocator import AllocatorPeak

    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with AllocatorPeak() as peak:
        yield
    _allocator_peaks.append(held + peak.bytes)


def _batch(options: argparse.Namespace, encoders: bool = False) -> dict[str, Any]:
    from short_training import cached_batch, image_batch

    if encoders:
        return image_batch(options.batch_size, options.resolution)
    text_width, pooled_width = {"sd15": (768, None), "sdxl": (2048, 1280)}[options.model]
    return cached_batch(options.batch_size, options.resolution, text_width, pooled_width)


def _full_fine_tuning(
    row: dict[str, Any], folder: Path, options: argparse.Namespace, seconds: list[float]
) -> Callable[[], None]:
    """Prepare full fine-tuning of the denoiser on random latents and text embeddings."""

    def run() -> None:
        import torch
        import torch.nn.functional as F
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(options.device).train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6)
        batch = _batch(options)
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
    """Prepare training of an adapter."""

    def run() -> None:
        import torch
        from lightning.pytorch import Callback, LightningModule, Trainer
        from peft import LoraConfig
        from short_training import RepeatedBatch, module_options, plain_trainer

        from lit_lora import LoraDiffusion, StableDiffusion, StableDiffusionXL

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

        family = (StableDiffusion if options.model == "sd15" else StableDiffusionXL)(str(folder))
        model = LoraDiffusion(family, LoraConfig(r=16, lora_alpha=16), **module_options(row, beside=("encoders",)))
        batch = _batch(options, encoders="encoders" in row)
        trainer = plain_trainer(options.device, devices=1, max_steps=2, callbacks=[Seconds()])
        trainer.fit(model, datamodule=RepeatedBatch(batch, 2))

    return run


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return cpu_cores()


if __name__ == "__main__":
    main()
