"""Time of a training step beside that of a script of diffusers: ``python -m benchmarks.script_pairs SCRIPT``.

SCRIPT is ``examples/text_to_image/train_text_to_image_lora.py`` or ``train_text_to_image_lora_sdxl.py`` of diffusers, or
``examples/dreambooth/train_dreambooth_lora_flux.py`` with ``--model flux_dev``; it needs ``pip install datasets``.

Both programs train LoRA of rank 16 in the attention layers of a model of real size with random weights, on the same images with
the same batch size, precision and optimizer; both read the images in the process that trains. Ours is ``lit-lora fit``. They take
turns step by step, and ``ratio`` is the median of theirs over ours in the pairs: above 1 ours takes less time. Times include
everything in a step: reading, encoding, logging. Only the script for FLUX.1 can cache: beside our cache it reads latents from
memory, and has one prompt for all images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from benchmarks.environment import cpu_cores, versions
from benchmarks.real_models import write_pipeline
from benchmarks.selection import selected
from lit_lora.datamodules.packing.pack import pack_folder

SETTINGS: dict[str, dict[str, Any]] = {
    "images and captions": {},
    "images, channels last, fused LoRA": {"convolutions": "channels_last", "fused_lora": True},
    "cached": {"cached": True},
    "cached, channels last": {"cached": True, "convolutions": "channels_last"},
    "images, packed, fused LoRA": {"convolutions": "packed", "fused_lora": True},
    "cached, fused LoRA": {"cached": True, "fused_lora": True},
    "cached, channels last, fused LoRA": {"cached": True, "convolutions": "channels_last", "fused_lora": True},
    "cached, packed, fused LoRA": {"cached": True, "convolutions": "packed", "fused_lora": True},
    "cached, compiled": {"cached": True, "compile_blocks": True},
    "cached, nf4": {"cached": True, "quantization": "NF4"},
    "cached, int8": {"cached": True, "quantization": "Int8"},
}
"""Name and options of each of our settings."""

FAMILIES = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "flux_dev": "Flux", "flux_cut": "Flux"}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
IMAGES = 64
RANK = 16
_MIXED = {"float32": "no", "bfloat16": "bf16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="script of diffusers")
    parser.add_argument("--model", choices=FAMILIES, default="sd15")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(_MIXED), default="bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both")
    parser.add_argument("--steps", type=int, default=20, help="measured pairs of steps")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the measured ones")
    parser.add_argument("--only", nargs="*", help="names of settings to measure, or parts of them")
    parser.add_argument("--folder", type=Path, help="keep the model and the images here, for another run")
    options = parser.parse_args()
    if options.folder is not None:
        _table(options, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        _table(options, Path(folder))


def _table(options: argparse.Namespace, folder: Path) -> None:
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if _is_flux(options) else torch.float32  # the script casts as it needs; a disk may be small
    model = write_pipeline(options.model, folder / options.model, device="cuda" if cuda else "cpu", dtype=dtype)
    images = _images(folder / f"images-{options.resolution}", options.resolution)
    print(
        f"{options.model} at {options.resolution} px, batch {options.batch_size}, {options.dtype}, LoRA r={RANK}, AdamW"
        f"{', checkpointing' * options.checkpointing}, {torch.cuda.get_device_name() if cuda else cpu_cores()}; "
        f"{versions('torch', 'lightning', 'diffusers', 'peft', 'accelerate')}"
    )
    print(f"{'':<34} {'s/step':>8} {options.script.stem:>34} {'ratio':>7} {'reserved':>20}", flush=True)
    for name in selected(SETTINGS, options.only):
        setting = SETTINGS[name]
        if setting.get("convolutions") == "packed" if cuda else setting.get("compile_blocks"):
            continue
        if _is_flux(options) and "convolutions" in setting:
            continue
        ours = _ours(setting, options, model, images, folder)
        found, other = _in_turns([ours, _theirs(options, model, images, folder, "cached" in setting)], options)
        ratio = statistics.median(b / a for a, b in zip(found["seconds"], other["seconds"], strict=True))
        memory = f"{found['reserved'] / 2**30:.2f} / {other['reserved'] / 2**30:.2f} GiB" if cuda else "-"
        seconds = [statistics.median(one["seconds"]) for one in (found, other)]
        print(f"{name:<34} {seconds[0]:>8.3f} {seconds[1]:>34.3f} {ratio:>7.3f} {memory:>20}", flush=True)


def _images(folder: Path, size: int) -> Path:
    """A folder with random images and a table of captions that the script reads, and the same images as shards beside it."""
    if folder.with_suffix(".shards").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(IMAGES):
        coarse = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(coarse.numpy()).resize((size, size)).save(folder / f"{number:03d}.jpg", quality=90)
        rows.append({"file_name": f"{number:03d}.jpg", "text": f"a photo of a cat, number {number}"})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pack_folder(folder, folder.with_suffix(".shards"), caption_column="text")
    return folder


def _ours(setting: dict[str, Any], options: argparse.Namespace, model: Path, images: Path, folder: Path) -> list[str]:
    """Arguments of our program, whose cache is made if the setting needs one."""
    adapter = {"r": RANK, "lora_alpha": RANK, "target_modules": LAYERS}
    data = {
        "train_shards": str(images.with_suffix(".shards")),
        "batch_size": options.batch_size,
        "resolution": options.resolution,
        "num_workers": 0,
        "decoder": {"center_crop": True},
    }
    own: dict[str, Any] = {name: value for name, value in setting.items() if name not in ("cached", "quantization")}
    if "quantization" in setting:
        own["quantization"] = {"class_path": setting["quantization"]}
    config = {
        "trainer": {
            "max_steps": options.steps + options.warm_up + 1,
            "max_epochs": -1,
            "gradient_clip_val": 1.0,
            "default_root_dir": str(folder / "ours"),
            "num_sanity_val_steps": 0,
        },
        "model": {
            "family": {
                "class_path": FAMILIES[options.model],
                "init_args": {"pretrained_model_name_or_path": str(model)},
            },
            "adapter": {"class_path": "LoraConfig", "init_args": adapter},
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 1e-4, "fused": True},
            },
            "base_dtype": options.dtype,
            "memory": {"gradient_checkpointing": options.checkpointing},
            **own,
        },
        "data": {"class_path": "WebDatasetDataModule", "init_args": data},
    }
    path = folder / "config.yaml"
    if setting.get("cached"):
        path.write_text(yaml.safe_dump(config))
        cache = folder / f"cache-{options.model}-{options.resolution}-{options.dtype}"
        made = ["-m", "lit_lora.cli", "cache", "--config", str(path), "--out", str(cache)]
        done = subprocess.run([sys.executable, *made], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"lit-lora cache failed; the end of its output:\n{done.stderr[-3000:]}")
        data["train_shards"] = str(cache)
    path.write_text(yaml.safe_dump(config))
    return ["lit_lora.cli", "fit", "--config", str(path)]


def _is_flux(options: argparse.Namespace) -> bool:
    return FAMILIES[options.model] == "Flux"


def _theirs(options: argparse.Namespace, model: Path, images: Path, folder: Path, cached: bool) -> list[str]:
    flux: dict[str, Any] = {
        "dataset_name": images,
        "instance_prompt": "a photo of a cat",
        "lora_layers": ",".join(LAYERS),
        "lora_alpha": RANK,
    }
    arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": model,
        **(flux if _is_flux(options) else {"train_data_dir": images}),
        "resolution": options.resolution,
        "train_batch_size": options.batch_size,
        "rank": RANK,
        "max_train_steps": options.steps + options.warm_up + 1,
        "mixed_precision": _MIXED[options.dtype],
        "output_dir": folder / "theirs",
        "cache_dir": folder / "datasets",
    }
    further = ["--gradient_checkpointing"] if options.checkpointing else []
    if _is_flux(options):
        further.append("--cache_latents" if cached else "--caption_column=text")
    return [str(options.script), *(f"--{name}={value}" for name, value in arguments.items()), *further]


def _in_turns(programs: Sequence[Sequence[str]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run two programs in turns and return what :mod:`benchmarks.in_turns` measured in each."""
    pipes = [os.pipe() for _ in programs]
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, program in enumerate(programs):
            own, other = pipes[number][0], pipes[1 - number][1]
            counts = [str(options.steps), str(options.warm_up)]
            command = [sys.executable, "-m", "benchmarks.in_turns", str(own), str(other), *counts]
            command += [f"{folder}/{number}.json", *program]
            with Path(folder, f"{number}.log").open("wb") as output:
                process = subprocess.Popen(command, pass_fds=(own, other), stdout=output, stderr=subprocess.STDOUT)
            started.append(process)
        os.write(pipes[0][1], b"x")
        for number, process in enumerate(started):
            if process.wait():
                for one in started:
                    one.kill()
                log = Path(folder, f"{number}.log").read_text(errors="replace")
                raise RuntimeError(f"{' '.join(programs[number])} failed; the end of its output:\n{log[-3000:]}")
        for end in (end for pipe in pipes for end in pipe):
            os.close(end)
        return [json.loads(Path(folder, f"{number}.json").read_text()) for number in range(len(programs))]


if __name__ == "__main__":
    main()
