"""Training steps on a GPU: none waits for it, and the results are the CPU's; skipped where there is no GPU.

``tests/test_pretended_cuda.py`` runs them on a pretended GPU. ``LIT_LORA_GPU_RUNS=40`` draws the options of 40 runs with a new
seed, which is printed and which ``LIT_LORA_GPU_SEED`` sets. Without it the same run is tested each time.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from lit_lora import (
    AdapterEMA,
    EditDecoder,
    FiniteGradients,
    ImageDecoder,
    LoraDiffusion,
    StepMetrics,
    StepProgress,
    WebDatasetDataModule,
)
from lit_lora.cli import main
from lit_lora.datamodules.packing.pack import pack_folder
from tests.families.folders import FOLDERS
from tests.gpu_waits import gpu_waits
from tests.helpers import differences
from tests.random_options import FAMILIES, Options
from tests.random_runs import runs_and_seed, train_in_parts, train_whole

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

RUNS, SEED = runs_and_seed("LIT_LORA_GPU_RUNS", "LIT_LORA_GPU_SEED", usual=1)

LENGTHS = {"ZImage", "QwenImage", "Krea2"}
"""Families whose denoiser gets the captions' own lengths, for which a step waits once."""


def test_waits_are_counted() -> None:
    here, there = torch.ones(4, 3), torch.ones(4, 3, device="cuda")
    with gpu_waits() as waits:
        total = (here.to("cuda", non_blocking=True) + there).sum()
        assert not waits
        assert total.item() == 24
        assert there.tolist() == here.tolist()
        here.to("cuda")
        there.nonzero()
    assert len(waits) == 4
    assert all(place.startswith("tests/test_cuda_steps.py:") for place in waits)


class Waits(Callback):
    """Keeps the places where the third step waited, the first that is like all that follow."""

    def __init__(self, waits: Counter[str]) -> None:
        self.waits = waits

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            self.waits.clear()
        self.places = Counter(self.waits)


@pytest.mark.parametrize("name", [kind.__name__ for kind in FOLDERS])
def test_no_step_waits_for_the_gpu(
    name: str,
    request: pytest.FixtureRequest,
    encode_image: Callable[..., bytes],
    trainer_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    kind, fixture = FAMILIES[name]
    pairs = kind.takes_sources
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        for ending in ("png", "source.png") if pairs else ("png",):
            (images / f"{number}.{ending}").write_bytes(encode_image(32, 32, "PNG", seed=number))
        (images / f"{number}.txt").write_text("a red seven")
    pack_folder(images, tmp_path / "shards")
    module = LoraDiffusion(
        kind(str(request.getfixturevalue(fixture))), peft.LoraConfig(r=2), base_dtype="float32", caption_dropout=0.5
    )
    data = WebDatasetDataModule(
        str(tmp_path / "shards"),
        batch_size=2,
        resolution=32,
        decoder=EditDecoder() if pairs else ImageDecoder(),
        num_workers=0,
    )
    del trainer_options["enable_progress_bar"]
    with gpu_waits() as counted:
        waits, progress = Waits(counted), StepProgress(refresh_seconds=1e6, line_seconds=1e6)
        callbacks = [waits, progress, StepMetrics(), FiniteGradients(), AdapterEMA(0.9)]
        options = {"accelerator": "gpu", "max_steps": 4, "gradient_clip_val": 1.0, "callbacks": callbacks}
        Trainer(**trainer_options | options).fit(module, data)
        sources = {"sources": [Image.new("RGB", (32, 32))]} if pairs else {}
        (image,) = module.generate(["a red seven"], height=32, width=32, num_inference_steps=2, **sources)
    assert image.size == (32, 32)
    # Models of transformers ask whether a mask hides anything, and make tensors of the sizes of images.
    ours = [place for place in waits.places.elements() if not place.startswith("transformers/")]
    assert len(ours) == (name in LENGTHS), ours


def test_train_runs_on_the_gpu_that_it_plans_for(encode_image: Callable[..., bytes], tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.png").write_bytes(encode_image(32, 32, "PNG", seed=number))
    train = ["train", str(images), "--base", "embedded", "--trigger", "a star", "--steps", "4", "--out", str(out)]
    torch.cuda.reset_peak_memory_stats()
    assert main(train) == 0
    plan = json.loads((out / "memory_plan.json").read_text())
    assert plan["device"] == torch.cuda.get_device_name()
    measured = json.loads(next(out.rglob("report.json")).read_text())["peak_memory"]
    assert plan["peak"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_that_is_resumed_on_a_gpu_equals_one_on_the_cpu(
    number: int,
    request: pytest.FixtureRequest,
    encode_image: Callable[..., bytes],
    trainer_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    r = random.Random(f"{SEED} {number}")
    called = f"LIT_LORA_GPU_SEED={SEED}, {number}"
    whole = train_whole(r, called, _for_a_gpu, request, encode_image, trainer_options, tmp_path)
    found = train_in_parts(r, whole, tmp_path / "gpu", trainer_options | {"accelerator": "gpu"})
    found = {name: _on_cpu(values) for name, values in found.items()}
    # Optimizers compute in another order on a GPU; quantized inputs and signs of gradients make more of it.
    losses = [{name: _loss(values) for name, values in run.items()} for run in (found, whole.seen)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)
    assert not list(differences(_batches(found), _batches(whole.seen)))[:20]


def _for_a_gpu(drawn: Options) -> None:
    """Leave out what rounds otherwise on a GPU and what is for CPUs alone."""
    drawn.base_dtype = "float32"
    drawn.convolutions = drawn.convolutions.replace("packed", "plain")
    drawn.steps = min(drawn.steps, 5)


def _loss(values: Any) -> float:
    """The loss of a batch, or of a validation."""
    return float(values["loss"] if isinstance(values, dict) else values)


def _batches(run: dict[str, Any]) -> dict[str, Any]:
    """What each batch held, and its learning rates."""
    return {name: values | {"loss": 0.0} for name, values in run.items() if isinstance(values, dict)}


def _on_cpu(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
