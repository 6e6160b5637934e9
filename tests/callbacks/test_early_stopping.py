"""Lightning's ``EarlyStopping`` in runs of ``lit-lora fit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lit_lora.cli import main


def test_a_run_stops_and_counts_on_when_it_is_resumed(sd_folder: Path, session_shards: Path, tmp_path: Path) -> None:
    """Without learning, no validation is better than the first; the one before a resume counts too."""
    stops = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 2}}
    saves = {"class_path": "AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path), "save_last": True}}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "val_check_interval": 2,
            "num_sanity_val_steps": -1,
            "default_root_dir": str(tmp_path),
            "enable_progress_bar": False,
            "callbacks": [stops, {"class_path": "BaseLoss"}, saves],
        },
        "model": {
            "family": {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": str(sd_folder)}},
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}},
            "base_dtype": "float32",
        },
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {
                "train_shards": str(session_shards),
                "val_samples": 2,
                "resolution": 16,
                "batch_size": 2,
                "num_workers": 0,
            },
        },
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = ["fit", "--config", str(tmp_path / "config.yaml")]
    assert main(command) == 0
    assert main([*command, "--trainer.max_steps", "12", "--ckpt_path", str(tmp_path / "last.ckpt")]) == 0
    checkpoint: dict[str, Any] = torch.load(tmp_path / "last.ckpt", weights_only=True)
    # The validation at step 2 set the loss to be beaten, and the second one after it ends the run.
    assert checkpoint["global_step"] == 6
