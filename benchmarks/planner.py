"""Planned memory compared with the allocator's peak: ``python benchmarks/planner.py``.

A real architecture with random weights is trained for two steps under the Trainer, each setting in a fresh process. The table
shows the planned peak beside the measured peak of torch's allocator, weights included, on the CPU or with ``--device cuda`` on a
GPU (``max_memory_allocated``). Loading is not compared, because the weights are drawn instead of read.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from fresh_processes import result_of_process

SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA, bf16 base, from a cache": {"cached": True},
    "LoRA, fp32 base, from a cache": {"cached": True, "base_dtype": "float32"},
    "LoRA, bf16 base": {},
    "LoRA, int8 base, checkpointing": {"cached": True, "quantization": "Int8", "gradient_checkpointing": True},
    "LoRA, nf4 base, checkpointing": {"cached": True, "quantization": "NF4", "gradient_checkpointing": True},
    "LoRA, fp8 base, batch 2": {"cached": True, "quantization": "FP8", "batch_size": 2},
    "LoRA, bf16 base, batch 2, 384 px": {"batch_size": 2, "size": 384},
    "LoRA, nf4 base, checkpointing, 384 px, 8-bit AdamW": {
        "quantization": "NF4",
        "gradient_checkpointing": True,
        "size": 384,
        "optimizer": "bitsandbytes.optim.AdamW8bit",
    },
    "LoRA r=128 in all layers, int8, 8-bit AdamW": {
        "cached": True,
        "quantization": "Int8",
        "rank": 128,
        "targets": "all",
        "optimizer": "bitsandbytes.optim.AdamW8bit",
    },
    "LoRA r=128 in all layers, int8, AdamW, clipped": {
        "cached": True,
        "quantization": "Int8",
        "rank": 128,
        "targets": "all",
        "clip": 1.0,
    },
    "full fine-tuning, fp32": {"full": True},
}
"""Name and options of each setting."""

_ALL_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=int, default=256, help="width and height of the images, unless a setting has its own"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="*", help="names of settings to compare, or parts of them")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(_compare(SETTINGS[options.setting], options)))
        return
    from real_models import write_pipeline
    from selection import selected

    print(f"{f'sd15 at {options.size} px unless named':<52} {'plan MB':>10} {'allocator MB':>13} {'':>7} seconds")
    with tempfile.TemporaryDirectory() as folder:
        write_pipeline("sd15", Path(folder) / "sd15", weights=False)
        for name in selected(SETTINGS, options.only):
            arguments = [f"--size={options.size}", f"--device={options.device}"]
            result = result_of_process([__file__, *arguments, f"--folder={folder}/sd15", f"--setting={name}"])
            off = result["planned"] / result["measured"] - 1
            columns = f"{result['planned'] / 1e6:>10,.0f} {result['measured'] / 1e6:>13,.0f} {off:>+7.1%}"
            print(f"{name:<52} {columns} {result['seconds']:>7.1f}", flush=True)


def _compare(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Plan and measure one setting in this process; ``seconds`` is the time that planning took."""
    warnings.simplefilter("ignore")
    import time

    import torch
    from allocator import peak_allocated

    from lit_lora.planning.device import WORKSPACES

    batch_size, size = setting.get("batch_size", 1), setting.get("size", options.size)
    prepare = _full if setting.get("full") else _adapter
    started = time.perf_counter()
    planned, build = prepare(setting, options, batch_size, size)
    seconds = time.perf_counter() - started
    weights, fit = build()
    if options.device == "cuda":
        fit()
        measured = torch.cuda.max_memory_allocated()
        # The plan lists workspaces apart from the tensors; torch's allocator hands them out too.
        planned += WORKSPACES
    else:
        measured = weights + peak_allocated(fit)
    return {"planned": planned, "measured": measured, "seconds": seconds}


def _adapter(setting: dict[str, Any], options: argparse.Namespace, batch_size: int, size: int) -> tuple[int, Any]:
    """Plan the training of an adapter.

    Returns:
        The planned peak in bytes, and a function that builds the model and returns the bytes of its weights and a function that
        trains it.
    """
    from peft import LoraConfig
    from short_training import cached_batch, draw_weights, image_batch

    import lit_lora.quantization
    from lit_lora import LoraDiffusion, MemoryOptions, StableDiffusion
    from lit_lora.planning.device import find_device
    from lit_lora.planning.plan_run import plan_run

    keys = {"memory": MemoryOptions(gradient_checkpointing=setting.get("gradient_checkpointing", False))}
    if "base_dtype" in setting:
        keys["base_dtype"] = setting["base_dtype"]
    if "quantization" in setting:
        keys["quantization"] = getattr(lit_lora.quantization, setting["quantization"])()
    if "optimizer" in setting:
        keys["optimizer"] = resolve_name(setting["optimizer"])
    rank = setting.get("rank", 16)
    targets = _ALL_LAYERS if "targets" in setting else None
    adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    model: Any = LoraDiffusion(StableDiffusion(options.folder), adapter, **keys)
    cached = frozenset({"latents", "text"} if setting.get("cached") else ())
    device = {"device": find_device("H100")} if options.device == "cuda" else {}
    plan = plan_run(model, batch_size, size, size, cached=cached, gradient_clip_val=setting.get("clip"), **device)
    planned = max(sum(kinds.values()) for phase, kinds in plan.phases.items() if phase != "load")

    def build() -> tuple[int, Any]:
        draw_weights(model, cached=bool(cached)).configure_model()
        batch = (cached_batch if cached else image_batch)(batch_size, size)
        return _weight_bytes(model), partial(_fit, model, batch, setting.get("clip"), options.device)

    return planned, build


def _full(setting: dict[str, Any], options: argparse.Namespace, batch_size: int, size: int) -> tuple[int, Any]:
    """Plan full fine-tuning of the denoiser without this project's module; returns the same as :func:`_adapter`."""
    import torch
    import torch.nn.functional as F
    from diffusers import UNet2DConditionModel
    from lightning.pytorch import LightningModule

    from lit_lora.planning.fake_module import fake_tensors
    from lit_lora.planning.step import make_meter, simulate_step

    class Full(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(options.folder, subfolder="unet")
            )

        def training_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Any:
            timesteps = torch.full((batch_size,), 500, device=batch["noisy"].device)
            prediction = self.unet(batch["noisy"], timesteps, batch["text"]).sample
            return F.mse_loss(prediction, batch["noisy"])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-6)

    def batch() -> dict[str, Any]:
        return {"noisy": torch.randn(batch_size, 4, size // 8, size // 8), "text": torch.randn(batch_size, 77, 768)}

    with fake_tensors():
        model, meter = Full().train(), make_meter(cuda=options.device == "cuda")
        meter.assign(model.parameters(), "adapter")
        inputs = batch()
        simulate_step(
            meter,
            list(model.parameters()),
            lambda: model.training_step(inputs),
            lambda _: model.configure_optimizers(),
            freed_after_step=False,
        )
    planned = max(sum(kinds.values()) for kinds in meter.peaks.values())

    def build() -> tuple[int, Any]:
        real = Full()
        return _weight_bytes(real), partial(_fit, real, batch(), None, options.device)

    return planned, build


def _fit(model: Any, batch: dict[str, Any], clip: float | None, device: str) -> None:
    """Train two steps."""
    from short_training import RepeatedBatch, plain_trainer

    trainer = plain_trainer(device, devices=1, max_steps=2, gradient_clip_val=clip)
    trainer.fit(model, datamodule=RepeatedBatch(batch, 2))


def _weight_bytes(model: Any) -> int:
    """Bytes of the model's parameters and buffers; storage that several of them share counts once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


if __name__ == "__main__":
    main()
