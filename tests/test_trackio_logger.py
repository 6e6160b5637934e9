"""trackio itself, where it is installed, gets what a run logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_lora import TrackioLogger
from lit_lora.errors import UserError

_RUN = """
import json
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from lit_lora import TrackioLogger

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("train/loss", float(self.global_step))
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        self.logger.log_image("samples", [Image.new("RGB", (8, 8), "red")], step=self.global_step)

for steps in (2, 4):  # the second run goes on with the first one
    model = Model()
    model.save_hyperparameters({"rank": 4, "base": {"dtype": "bf16"}})
    options = {"max_steps": steps, "log_every_n_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    logger = TrackioLogger("glyphs", "first")
    Trainer(accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False, **options).fit(model)

from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("glyphs", "first")
config = SQLiteStorage.get_run_config("glyphs", "first")
print(json.dumps([SQLiteStorage.get_runs("glyphs"), rows, config], default=str))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_metrics_images_and_hyperparameters(tmp_path: Path) -> None:
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs, rows, config = json.loads(done.stdout.splitlines()[-1])
    assert runs == ["first"]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, float(step)) for step in (0, 1, 0, 1, 2, 3)]
    images = [row["samples"] for row in rows if "samples" in row]
    assert [image["_type"] for image in images] == ["trackio.image"] * 2
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 2
    assert (config["rank"], config["base/dtype"]) == (4, "bf16")


def test_trackio_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"):
        TrackioLogger("glyphs")
