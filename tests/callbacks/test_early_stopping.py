"""Lightning's ``EarlyStopping`` in runs of ``lit-lora fit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora.cli import main


def test_a_run_stops_and_counts_on_when_it_is_resumed(
    sd_folder: Path, session_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without learning, no validation is better than the first; the one before a resume counts too."""
    stops: dict[str, Any] = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 2}}
    saves = {"class_path": "AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path), "save_last": True}}
    reports = {"class_path": "RunReport", "init_args": {"output_dir": str(tmp_path)}}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "val_check_interval": 2,
            "num_sanity_val_steps": -1,
            "default_root_dir": str(tmp_path),
            "enable_progress_bar": False,
            "callbacks": [stops, {"class_path": "BaseLoss"}, saves, reports],
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

    def reported() -> tuple[int, str | None]:
        report = json.loads((tmp_path / "report.json").read_text())
        step: int = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
        return step, report["stopped_early"]

    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = ["fit", "--config", str(tmp_path / "config.yaml")]
    assert main(command) == 0
    assert reported() == (4, None)
    command += ["--trainer.max_steps", "14", "--ckpt_path", str(tmp_path / "last.ckpt")]
    capsys.readouterr()
    assert main(command) == 0
    # The validation at step 2 set the loss to be beaten, and the second one after it ends the run.
    step, reason = reported()
    assert step == 6
    assert reason is not None
    assert reason.startswith("Monitored metric val/loss did not improve in the last 2 records. Best score: ")
    shown = capsys.readouterr()
    assert "ended by early stopping: Monitored metric val/loss" in " ".join(shown.out.split())

    told = (
        r"early stopping has ended this run at step 6 \(Monitored metric val/loss did not improve in the last 2 .*"
        "ends it again unless val/loss is better; raise patience, which is 2, to train on"
    )
    with pytest.warns(UserWarning, match=told):
        assert main(command) == 0
    assert reported()[0] == 8

    stops["init_args"]["patience"] = 5
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(command) == 0
    assert reported()[0] == 12, "the patience is that of the config, not that of the checkpoint"
