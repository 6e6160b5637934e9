"""A run that is killed and resumed ends with the adapter of the run that was not, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lit_lora.datamodules.packing.pack import pack_folder
from tests.warm_python import WarmPython

STEPS = 42  # a multiple of the steps between checkpoints


def write_config(folder: Path, base: Path, shards: Path) -> Path:
    checkpoints = {"every_n_train_steps": 3, "save_last": "link", "enable_version_counter": False}
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "max_epochs": -1,
            "default_root_dir": str(folder),
            "num_sanity_val_steps": 0,
            "val_check_interval": 7,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "gradient_clip_val": 1.0,
            "callbacks": [{"class_path": "AdapterCheckpoint", "init_args": checkpoints}, {"class_path": "AdapterEMA"}],
        },
        "model": {
            "family": {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": str(base)}},
            # Dropout draws from the global generator: resuming must bring that back too.
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.2}},
            "base_dtype": "float32",
            "caption_dropout": 0.2,
        },
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {
                "train_shards": str(shards),
                "val_samples": 3,
                "batch_size": 2,
                "resolution": 16,
                "decoder": {"random_flip": True},
                "num_workers": 0,
            },
        },
    }
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, *more: str) -> WarmPython:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return WarmPython(["-m", "lit_lora.cli", "fit", "--config", str(config), *more], environment)


def final_adapter(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the files at the last step (not their bytes: safetensors orders metadata by chance)."""
    [ending] = [p.parent for p in folder.rglob("checkpoints/*.ckpt") if p.name.endswith(f"step={STEPS}.ckpt")]
    return {
        f"{kind}/{file.name}/{name}": tensor
        for kind in ("adapter", "ema.adapter")
        for file in sorted(next(ending.glob(f"*step={STEPS}.{kind}")).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.slow
def test_killed_and_resumed_equals_not_killed(sd_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(26):
        Image.linear_gradient("L").rotate(13 * i).resize((20 + i, 24)).convert("RGB").save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"picture {i}")
    pack_folder(images, tmp_path / "shards", samples_per_shard=9)

    whole = write_config(tmp_path / "whole", sd_folder, tmp_path / "shards")
    assert start(whole).wait(timeout=300) == 0

    killed = write_config(tmp_path / "killed", sd_folder, tmp_path / "shards")
    # Killed twice, once new checkpoints are there, in the middle of whatever comes then; each time with other workers.
    for checkpoints, workers in ((2, "0"), (4, "2")):
        run = start(killed, "--ckpt_path", "last", "--data.init_args.num_workers", workers)
        seen: set[Path] = set()
        deadline = time.monotonic() + 200
        while len(seen) < checkpoints and run.poll() is None and time.monotonic() < deadline:
            seen |= {
                p.resolve() for p in (tmp_path / "killed").glob("lightning_logs/*/checkpoints/last.ckpt") if p.exists()
            }
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert len(seen) >= checkpoints, "the run ended before it could be killed"
    assert start(killed, "--ckpt_path", "last").wait(timeout=300) == 0

    expected, got = final_adapter(tmp_path / "whole"), final_adapter(tmp_path / "killed")
    assert expected.keys() == got.keys()
    assert len({name.rpartition("/")[0] for name in expected}) == 4
    assert all(torch.equal(expected[name], got[name]) for name in expected)
