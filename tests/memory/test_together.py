"""All mechanisms at once, through a Trainer, by their keys."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig

import lit_lora.denoiser_options
import lit_lora.module
import lit_lora.run_checks
from lit_lora.callbacks import SampleImages
from lit_lora.families import StableDiffusion
from lit_lora.memory.activation_offload import ActivationOffload
from lit_lora.memory.block_offload import BlockOffload
from lit_lora.memory.optimizer_in_backward import OptimizerInBackward
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.quantization import Int8
from tests.helpers import loader_of, make_batches

EVERYTHING = MemoryOptions(
    gradient_checkpointing=["down_blocks.*", "mid_block"],
    offload_encoders=True,
    offload_blocks=True,
    offload_activations=True,
    optimizer_in_backward=True,
)


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the module makes, in sizes that suit a tiny model, on a CPU, where it saves nothing and computes the same."""
    made: list[Any] = []

    def making(kind: Any, **options: Any) -> Any:
        def make(*args: Any, **more: Any) -> Any:
            made.append(partial(kind, **options)(*args, **more))
            return made[-1]

        return make

    monkeypatch.setattr(lit_lora.run_checks, "check_offload", lambda *_: None)
    monkeypatch.setattr(lit_lora.denoiser_options, "BlockOffload", making(BlockOffload, smallest_bytes=256))
    monkeypatch.setattr(lit_lora.module, "ActivationOffload", making(ActivationOffload, smallest_bytes=1024))
    monkeypatch.setattr(lit_lora.module, "OptimizerInBackward", making(OptimizerInBackward, bucket_bytes=2000))
    return made


def test_training_validation_and_images_are_the_same(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, used: list[Any]
) -> None:
    results = []
    for name, memory in {"plain": MemoryOptions(), "sparing": EVERYTHING}.items():
        torch.manual_seed(0)
        family = StableDiffusion(str(sd_folder))
        module = LoraDiffusion(
            family,
            LoraConfig(r=2, lora_alpha=2),
            quantization=Int8(),
            base_dtype="float32",
            memory=memory,
        )
        losses = Losses()
        options = trainer_options | {
            "default_root_dir": tmp_path / name,
            "max_steps": 4,
            "val_check_interval": 2,
            "callbacks": [losses, SampleImages(["a star"], every_n_steps=2, num_inference_steps=2)],
        }
        trainer = Trainer(**options)
        trainer.fit(module, loader_of(make_batches(4)), loader_of(make_batches(2, seed=4)))
        images = [path.read_bytes() for path in sorted((tmp_path / name).glob("samples/*.png"))]
        assert len(images) == 3
        assert bool(used) == (memory is EVERYTHING)
        weights = [p.detach() for p in module.parameters() if p.requires_grad]
        results.append((losses.losses, trainer.callback_metrics["val/loss"].item(), weights, images[0]))
    torch.testing.assert_close(results[1][:3], results[0][:3], rtol=1e-3, atol=1e-6)
    assert results[1][3] == results[0][3]  # drawn before the first step
    [blocks] = [made for made in used if isinstance(made, BlockOffload)]
    assert blocks.host_bytes > 2 * blocks.device_bytes
    assert not any(block.is_on_device for block in blocks._blocks)  # the end of the run has moved the module back
    assert sum(made.bytes_moved for made in used if isinstance(made, ActivationOffload)) > 0
    assert sum(isinstance(made, OptimizerInBackward) for made in used) == 1
