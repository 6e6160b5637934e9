"""A run that is planned to take more than its limit is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from peft import LoraConfig
from torch.utils.data import DataLoader

from lit_lora import AdapterEMA, LitLoraFSDP, LoraDiffusion, MemoryLimit, MemoryProfiler, SampleImages, StableDiffusion
from lit_lora.callbacks.memory_limit import run_of
from lit_lora.errors import UserError
from lit_lora.planning import changes
from lit_lora.planning.plan_run import plan
from tests.helpers import loader_of, make_batches


@pytest.fixture(autouse=True)
def _few_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change is a plan of a second; tests/planning/test_changes.py has all of them."""
    monkeypatch.setattr(changes, "CANDIDATES", changes.CANDIDATES[2:4])


class Images(LightningDataModule):
    batch_size, resolution = 2, 16

    def train_dataloader(self) -> Any:
        return DataLoader(make_batches(2), batch_size=None)  # type: ignore[arg-type]


class OfUnknownSize(LightningDataModule):
    train_dataloader = Images.train_dataloader


def _module(folder: Path) -> LoraDiffusion:
    return LoraDiffusion(StableDiffusion(str(folder)), LoraConfig(r=2, lora_alpha=2))


def _trainer(options: dict[str, Any], limit: str) -> Trainer:
    return Trainer(max_steps=1, callbacks=[MemoryLimit(limit)], **options)


def test_a_run_that_does_not_fit_is_refused_before_it_loads(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = _module(sd_folder)
    with pytest.raises(UserError, match=r"MemoryLimit: does not fit: .* of 500.0 MB"):
        _trainer(trainer_options, "500MB").fit(module, datamodule=Images())
    assert module.family.denoiser is None


def test_a_run_that_fits_starts(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    trainer = _trainer(trainer_options, "4GB")
    trainer.fit(_module(sd_folder), datamodule=Images())
    assert trainer.global_step == 1


def test_the_named_changes_make_the_run_fit(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    trainer = Trainer(max_steps=1, **trainer_options)
    trainer.fit(_module(sd_folder), datamodule=Images())
    needed = plan(run_of(_module(sd_folder), trainer)).needed
    limit = str(needed - 20_000)
    with pytest.raises(UserError, match=r"The cheapest changes that make it fit, cumulatively:\n  --model"):
        _trainer(trainer_options, limit).fit(_module(sd_folder), datamodule=Images())


def test_data_of_unknown_size(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"cannot be planned, since there is no datamodule: use .* an integer resolution"
    ):
        _trainer(trainer_options, "4GB").fit(_module(sd_folder), Images().train_dataloader())


def test_the_run_is_what_the_trainer_does(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    drawing = SampleImages(["a star"] * 3, guidance_scale=1.0, height=32, width=24, every_n_steps=9)
    trainer = Trainer(
        max_steps=1,
        accumulate_grad_batches=3,
        gradient_clip_val=0.5,
        callbacks=[drawing, AdapterEMA()],
        **trainer_options,
    )
    data: Any = Images()
    trainer.datamodule = data  # type: ignore[attr-defined]
    run = run_of(_module(sd_folder), trainer)
    assert (run.batch_size, run.height, run.width, run.accumulate_grad_batches, run.gradient_clip_val) == (
        2,
        16,
        16,
        3,
        0.5,
    )
    assert run.sampling is not None
    assert (run.sampling.images, run.sampling.guidance_scale, run.sampling.height) == (3, 1.0, 32)
    assert run.averaged
    assert not run.validation


def test_only_fits_are_planned(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    trainer = _trainer(trainer_options, "1kB")
    trainer.validate(_module(sd_folder), loader_of(make_batches(1)), verbose=False)
    assert "val/loss" in trainer.callback_metrics


def test_other_modules_cannot_be_planned(trainer_options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="MemoryLimit can plan a LoraDiffusion, not a BoringModel; remove it"):
        _trainer(trainer_options, "4GB").fit(BoringModel())


def test_strategies_that_shard_weights_are_planned_with_the_shards(sd_folder: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=4, strategy=LitLoraFSDP(), logger=False)
    trainer.datamodule = Images()  # type: ignore[attr-defined]
    processes = run_of(_module(sd_folder), trainer).processes
    assert (processes.count, processes.description.split(":")[0]) == (4, "each of 4 processes, FSDP2")


def test_a_limit_is_an_amount_of_bytes() -> None:
    with pytest.raises(UserError, match="limit='much' is not a byte size"):
        MemoryLimit("much")


def test_advice_at_an_out_of_memory_error(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    class Exhausted(LoraDiffusion):
        def training_step(self, *_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for data, known in ((Images(), True), (OfUnknownSize(), False)):
        module = Exhausted(StableDiffusion(str(sd_folder)), LoraConfig(r=2, lora_alpha=2))
        profiler = MemoryProfiler(output_dir=str(tmp_path))
        with pytest.raises(torch.OutOfMemoryError):
            Trainer(max_steps=1, callbacks=[profiler], **trainer_options).fit(module, datamodule=data)
        advice = json.loads((tmp_path / "memory.json").read_text())["out_of_memory"]["advice"]
        assert ("--model.memory.gradient_checkpointing true" in [change for change, _ in advice]) is known
        saved = [size for _, size in advice]
        assert saved == sorted(saved, reverse=True)
        assert saved
