"""Time of a training step, beside a bare loop and the device's limit: ``python -m benchmarks.speed``.

A model of real size with random weights learns on random images, each setting in a fresh process. The bare loop is plain PyTorch,
diffusers and PEFT with the same adapter, optimizer and clipping: encode, add noise, denoise, loss, backward, clip, step. Its base
is stored in ``--dtype`` and is neither quantized nor checkpointed. First ours trains alone under the Trainer, which gives the
peaks of memory. Then both take turns step by step, so that changes of the machine's speed affect both; ``ratio`` is the median
over the pairs. ``--memory`` leaves the bare loop out.

``of limit`` is the share of the device's measured rate of matrix products that the operations of the step come to (they are
counted by the plan; recomputed operations do not count). ``operations``, ``copies`` and ``syncs`` are counts of one step by
torch's profiler, ours and the bare loop's: calls of ATen that compute or move data, copies among them, and values that the host
waits for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile

from benchmarks.bare_step import Bare, BareFlux
from benchmarks.environment import cpu_cores, versions
from benchmarks.fresh_processes import result_of_process
from benchmarks.real_models import write_pipeline
from benchmarks.selection import selected
from benchmarks.short_training import (
    RepeatedBatch,
    cached_batch,
    draw_weights,
    image_batch,
    module_options,
    plain_trainer,
)
from lit_lora import Flux, LoraDiffusion, ModelFamily, StableDiffusion, StableDiffusionXL
from lit_lora.planning.device import find_device
from lit_lora.planning.plan_run import plan_run

SETTINGS: dict[str, dict[str, Any]] = {
    "cached": {"cached": True},
    "cached, channels last": {"cached": True, "convolutions": "channels_last"},
    "cached, packed, fused LoRA": {"cached": True, "convolutions": "packed", "fused_lora": True},
    "cached, fused LoRA": {"cached": True, "fused_lora": True},
    "cached, checkpointing": {"cached": True, "gradient_checkpointing": True},
    "cached, int8": {"cached": True, "quantization": "Int8"},
    "cached, w8a8": {"cached": True, "quantization": "W8A8"},
    "cached, nf4": {"cached": True, "quantization": "NF4"},
    "cached, int8, checkpointing": {"cached": True, "quantization": "Int8", "gradient_checkpointing": True},
    "cached, nf4, checkpointing": {"cached": True, "quantization": "NF4", "gradient_checkpointing": True},
    "cached, nf4, least memory": {
        "cached": True,
        "quantization": "NF4",
        "gradient_checkpointing": True,
        "offload_activations": True,
        "optimizer": "bitsandbytes.optim.AdamW8bit",
    },
    "cached, compiled": {"cached": True, "compile_blocks": True},
    "cached, w8a8, compiled": {"cached": True, "quantization": "W8A8", "compile_blocks": True},
    "cached, nf4, compiled": {"cached": True, "quantization": "NF4", "compile_blocks": True},
    "cached, blocks on the host": {"cached": True, "offload_blocks": True, "gradient_checkpointing": True},
    "cached, blocks on the disk": {
        "cached": True,
        "offload_blocks": True,
        "offload_folder": f"{tempfile.gettempdir()}/lit-lora-blocks",
        "gradient_checkpointing": True,
    },
    "images and captions": {},
}
"""Name and options of each setting."""

MODELS: dict[str, tuple[type[ModelFamily], type[Bare], dict[str, int]]] = {
    "sd15": (StableDiffusion, Bare, {"text_width": 768}),
    "sdxl": (StableDiffusionXL, Bare, {"text_width": 2048, "pooled_width": 1280}),
    "flux_dev": (Flux, BareFlux, {"text_width": 4096, "pooled_width": 768, "tokens": 512, "channels": 16}),
}
"""Models: family, bare loop, and the sizes of latents and text embeddings. Only those of the first two encode images."""

_OUTSIDE = (
    "aten::view",
    "aten::as_strided",
    "aten::t",
    "aten::transpose",
    "aten::detach",
    "aten::reshape",
    "aten::empty",
    "aten::numpy_T",
    "aten::permute",
    "aten::_unsafe_view",
    "aten::flatten",
    "aten::unflatten",
)
"""Beginnings of the names of operations that neither compute nor move data."""


class Turns(Callback):
    """Times each step, and after the first ones runs a step of the bare loop after it. The last step is profiled, not timed.

    Args:
        options: Options of the command.
        setting: Setting of ours.
    """

    def __init__(self, options: argparse.Namespace, setting: dict[str, Any]) -> None:
        self.options, self.setting, self.cuda = options, setting, options.device == "cuda"
        self.bare: Bare | None = None
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.peaks = (0, 0)
        self.profiler = _profiler(self.cuda)
        self.steps = options.warm_up + options.steps

    def on_train_start(self, *_: Any) -> None:
        self.started = self._now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.steps:
            self.profiler.__exit__(None, None, None)
            return
        self.ours.append(self._now() - self.started)
        if self.cuda and batch_idx + 1 == self.options.warm_up:
            self.peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        if batch_idx + 1 >= self.options.warm_up and not self.options.memory:
            if self.bare is None:
                self.bare = self._bare(batch)
            started = self._now()
            self.bare.step()
            self.theirs.append(self._now() - started)
        if batch_idx + 1 == self.steps:
            self.profiler.__enter__()
        self.started = self._now()

    def _bare(self, batch: dict[str, Any]) -> Bare:
        plain = {"cached": self.setting.get("cached")}
        module = draw_weights(_module(plain, self.options), bool(self.setting.get("cached")))
        module.configure_model()
        return MODELS[self.options.model][1](
            module.to(self.options.device).train(), batch, getattr(torch, self.options.dtype)
        )

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=20, help="measured pairs of steps")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 (default) keeps torch's own number")
    parser.add_argument("--memory", action="store_true", help="measure ours alone, without the bare loop")
    parser.add_argument("--only", nargs="*", help="names of settings to measure, or parts of them")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(_measure(SETTINGS[options.setting], options)))
        return
    _table(options)


def _table(options: argparse.Namespace) -> None:
    kept = ("model", "resolution", "batch_size", "device", "dtype", "steps", "warm_up", "threads")
    arguments = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in kept]
    print(
        f"{options.model} at {options.resolution} px, batch {options.batch_size}, {options.dtype}, LoRA r=16, AdamW, "
        f"{_device_name(options.device)}; {versions('torch', 'lightning', 'diffusers', 'peft')}"
    )
    print(
        f"{'':<34} {'s/step':>8} {'bare':>8} {'ratio':>7} {'images/s':>9} {'of limit':>9} {'allocated':>10} {'reserved':>9} "
        f"{'operations':>16} {'copies':>11} {'syncs':>7}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_pipeline(options.model, Path(folder) / options.model, weights=False)
        own = [*arguments, f"--folder={folder}/{options.model}", *(["--memory"] if options.memory else [])]
        for name in selected(SETTINGS, options.only):
            if not _measurable(SETTINGS[name], options):
                continue
            print(_line(name, result_of_process(["-m", "benchmarks.speed", *own, f"--setting={name}"])), flush=True)


def _measurable(setting: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a setting can be measured on the device with the model."""
    on_gpu = {"compile_blocks", "offload_blocks", "offload_activations"} & setting.keys()
    on_cpu = setting.get("convolutions") == "packed"
    if options.model == "flux_dev" and ("convolutions" in setting or "cached" not in setting):
        return False
    return not (on_gpu if options.device == "cpu" else on_cpu)


def _line(name: str, found: dict[str, Any]) -> str:
    def pair(key: str) -> str:
        return "/".join(f"{found[one][key]}" for one in ("ours", "bare") if found.get(one))

    def gib(key: str) -> str:
        return f"{found[key] / 2**30:.2f} GiB" if found[key] else "-"

    bare = f"{found['bare_seconds']:>8.3f} {found['ratio']:>7.3f}" if found["bare_seconds"] else f"{'-':>8} {'-':>7}"
    return (
        f"{name:<34} {found['seconds']:>8.3f} {bare} {found['images']:>9.2f} {found['share']:>9.1%} {gib('allocated'):>10} "
        f"{gib('reserved'):>9} {pair('operations'):>16} {pair('copies'):>11} {pair('syncs'):>7}"
    )


def _measure(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one setting in this process."""
    warnings.simplefilter("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    batch = (
        cached_batch(options.batch_size, options.resolution, **MODELS[options.model][2])
        if setting.get("cached")
        else image_batch(options.batch_size, options.resolution)
    )
    cached = frozenset(("latents", "text") if setting.get("cached") else ())
    plan = plan_run(
        _module({**setting, "gradient_checkpointing": False}, options),
        options.batch_size,
        options.resolution,
        options.resolution,
        cached=cached,
        device=find_device("H100" if cuda else "cpu"),
    )
    turns = Turns(options, setting)
    steps = turns.steps + 1
    trainer = plain_trainer(
        options.device, devices=1, max_steps=steps, gradient_clip_val=1.0, callbacks=[turns], log_every_n_steps=10
    )
    module = draw_weights(_module(setting, options), bool(setting.get("cached")))
    trainer.fit(module, datamodule=RepeatedBatch(batch, steps))
    ours, theirs = turns.ours[options.warm_up :], turns.theirs[1:]
    seconds = statistics.median(ours)
    counts = {"ours": _counts(turns.profiler)}
    if turns.bare is not None:
        with _profiler(cuda) as profiler:
            turns.bare.step()
        counts["bare"] = _counts(profiler)
    return {
        "seconds": seconds,
        "bare_seconds": statistics.median(theirs) if theirs else None,
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if theirs else None,
        "images": options.batch_size / seconds,
        "share": plan.flops_per_step / seconds / _matmul_rate(options.device, getattr(torch, options.dtype)),
        "allocated": turns.peaks[0],
        "reserved": turns.peaks[1],
        **counts,
    }


def _module(setting: dict[str, Any], options: argparse.Namespace) -> LoraDiffusion:
    family = MODELS[options.model][0](options.folder)
    own = module_options(setting, beside=("cached",))
    return LoraDiffusion(family, LoraConfig(r=16, lora_alpha=16), base_dtype=options.dtype, **own)


def _profiler(cuda: bool) -> profile:
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])


def _counts(profiler: profile) -> dict[str, int]:
    """Operations, copies and synchronisations that a profiler saw."""
    calls = {event.key: event.count for event in profiler.key_averages()}
    aten = {name: count for name, count in calls.items() if name.startswith("aten::")}
    waits = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize")
    return {
        "operations": sum(count for name, count in aten.items() if not name.startswith(_OUTSIDE)),
        "copies": aten.get("aten::copy_", 0),
        "syncs": sum(calls.get(name, 0) for name in waits),
    }


def _matmul_rate(device: str, dtype: Any) -> float:
    """Floating point operations per second of a large matrix product."""
    size = 8192 if device == "cuda" else 2048
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        (first @ second).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _device_name(device: str) -> str:

    return torch.cuda.get_device_name() if device == "cuda" else cpu_cores()


if __name__ == "__main__":
    main()
