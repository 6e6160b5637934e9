"""Training on a pretended GPU: nothing is on the wrong device, no step waits for the GPU, and the results are the CPU's.

``LIT_LORA_GPU_RUNS=40 pytest -n 0 -s tests/test_pretended_gpu.py`` draws the options of 40 runs with a new seed, which is printed
and which ``LIT_LORA_GPU_SEED`` sets. Without it the same run is tested each time.
"""

from __future__ import annotations

import os
import random
import warnings
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
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from lit_lora.datamodules.packing.pack import pack_folder
from tests.families.folders import FOLDERS
from tests.helpers import differences
from tests.pretended_gpu import GPU, OneGPU, PretendedGPU, pretended_gpu
from tests.random_options import FAMILIES, Options
from tests.random_runs import train_in_parts, train_whole

pytestmark = pytest.mark.slow

RUNS = int(os.environ.get("LIT_LORA_GPU_RUNS", 1))
_NEW = int.from_bytes(os.urandom(4), "big") if "LIT_LORA_GPU_RUNS" in os.environ else 0
SEED = int(os.environ.get("LIT_LORA_GPU_SEED") or _NEW)

LENGTHS = {"ZImage", "QwenImage", "Krea2"}
"""Families whose denoiser gets the captions' own lengths, for which a step waits once."""


def test_the_pretended_gpu_shows_what_a_gpu_would() -> None:
    layer, there = torch.nn.Linear(3, 2), torch.ones(4, 3)
    expected = layer(there).sum()
    with pretended_gpu() as gpu:
        layer.to(GPU)
        assert sum(gpu.waits.values()) == 2
        gpu.waits.clear()
        with pytest.raises(RuntimeError, match="same device, but addmm got"):
            layer(there)
        with pytest.raises(RuntimeError, match="same device, but index got"):
            there[torch.zeros(2, dtype=torch.long, device=GPU)]
        total = layer(there.to(GPU, non_blocking=True)).sum()
        total.backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.device == total.device == GPU
        assert not gpu.waits
        assert total.item() == expected
        assert there.to(GPU).tolist() == there.tolist()
        with pytest.raises(TypeError, match="numpy"):
            total.detach().numpy()
    assert sorted(gpu.waits.values()) == [1, 2]  # that of item, those of the copies there and back


def test_the_pretended_gpu_multiplies_complex_numbers() -> None:
    """Their gradients have conjugates, which torch computes late."""
    numbers = torch.polar(torch.rand(3, 2), torch.rand(3, 2))

    def gradient(values: Tensor) -> Tensor:
        values.requires_grad_()
        (values * numbers.to(values.device)).imag.sum().backward()
        assert values.grad is not None
        return values.grad.cpu()

    expected = gradient(torch.ones(3, 2, dtype=torch.complex64))
    with pretended_gpu():
        assert torch.equal(gradient(torch.ones(3, 2, dtype=torch.complex64, device=GPU)), expected)


class Waits(Callback):
    """Keeps the places where the third step waited, the first that is like all that follow."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert PretendedGPU.running is not None
        if trainer.global_step == 2:
            PretendedGPU.running.waits.clear()
        self.places = Counter(PretendedGPU.running.waits)


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
    waits, progress = Waits(), StepProgress(refresh_seconds=1e6, line_seconds=1e6)
    callbacks = [waits, progress, StepMetrics(), FiniteGradients(), AdapterEMA(0.9)]
    del trainer_options["accelerator"], trainer_options["enable_progress_bar"]
    options: dict[str, Any] = {"max_steps": 4, "gradient_clip_val": 1.0, "strategy": OneGPU(), "callbacks": callbacks}
    with pretended_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(**trainer_options | options).fit(module, data)
        sources = {"sources": [Image.new("RGB", (32, 32))]} if pairs else {}
        (image,) = module.generate(["a red seven"], height=32, width=32, num_inference_steps=2, **sources)
    assert image.size == (32, 32)
    # Models of transformers ask whether a mask hides anything, and make tensors of the sizes of images.
    ours = [place for place in waits.places.elements() if not place.startswith("transformers/")]
    assert len(ours) == (name in LENGTHS), ours


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
    with sdpa_kernel(SDPBackend.MATH):
        whole = train_whole(r, called, _for_a_gpu, request, encode_image, trainer_options, tmp_path)
    del trainer_options["accelerator"]
    with pretended_gpu():
        found = train_in_parts(r, whole, tmp_path / "gpu", trainer_options | {"strategy": OneGPU()})
        found = {name: _on_cpu(values) for name, values in found.items()}
    # Optimizers compute in another order on a GPU; quantized inputs and signs of gradients make more of it.
    losses = [{name: _loss(values) for name, values in run.items()} for run in (found, whole.seen)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)
    assert not list(differences(_batches(found), _batches(whole.seen)))[:20]


def _for_a_gpu(drawn: Options) -> None:
    """Leave out what the pretended GPU cannot do and what is for CPUs alone."""
    drawn.base_dtype, drawn.memory["offload_blocks"] = "float32", False
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
