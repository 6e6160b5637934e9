"""Checkpoints that LoraDiffusion reads without AdapterCheckpoint, which has checks of its own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig

from lit_lora.adapters import adapter_keys
from lit_lora.callbacks import AdapterCheckpoint, ImageWriter
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from tests.helpers import loader_of, make_batches

OTHERS = [
    ({"target_modules": ["to_q", "ff.net.2"]}, "tensors of this adapter are not in the checkpoint"),
    ({"target_modules": ["to_q"]}, "tensors of the checkpoint are not in this adapter"),
]
ALPHA = ({"lora_alpha": 8}, "lora_alpha is 8, in the checkpoint 2")


def module_for(folder: Path, **config: Any) -> LoraDiffusion:
    adapter = LoraConfig(**{"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_k"]} | config)
    return LoraDiffusion(StableDiffusion(str(folder)), adapter, base_dtype="float32")


def trained(folder: Path, options: dict[str, Any], saves: ModelCheckpoint) -> tuple[LoraDiffusion, str]:
    module = module_for(folder)
    Trainer(**options | {"callbacks": [saves], "enable_checkpointing": True, "max_steps": 1}).fit(
        module, loader_of(make_batches(1))
    )
    return module, saves.best_model_path


@pytest.mark.parametrize(("other", "message"), [*OTHERS, ALPHA])
def test_a_checkpoint_of_another_adapter_is_refused(
    other: dict[str, Any], message: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    _, path = trained(sd_folder, trainer_options, AdapterCheckpoint(tmp_path))
    with pytest.raises(UserError, match=message):
        LoraDiffusion.load_from_checkpoint(
            path, family=StableDiffusion(str(sd_folder)), adapter=module_for(sd_folder, **other).adapter
        )
    with warnings.catch_warnings(), pytest.raises(UserError, match=message):
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        Trainer(**trainer_options).test(module_for(sd_folder, **other), loader_of(make_batches(1)), ckpt_path=path)


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_a_whole_checkpoint_of_another_adapter_is_refused(
    other: dict[str, Any], message: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    _, path = trained(sd_folder, trainer_options, ModelCheckpoint(tmp_path))
    with pytest.raises(UserError, match=message):
        Trainer(**trainer_options).test(module_for(sd_folder, **other), loader_of(make_batches(1)), ckpt_path=path)


def test_load_from_checkpoint_needs_the_constructors_arguments_and_warns_of_nothing(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module, path = trained(sd_folder, trainer_options, AdapterCheckpoint(tmp_path))
    loaded = LoraDiffusion.load_from_checkpoint(
        path, family=StableDiffusion(str(sd_folder)), adapter=module_for(sd_folder).adapter, base_dtype="float32"
    )
    expected, found = module.state_dict(), loaded.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in adapter_keys(module))
    loaded.save_adapter(tmp_path / "adapter")


def test_several_dataloaders(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    trainer = Trainer(**trainer_options | {"max_steps": 2, "callbacks": [ImageWriter(str(tmp_path / "images"))]})
    module, batches = module_for(sd_folder), make_batches(2)
    loaders = [loader_of(batches[:1]), loader_of(batches[1:])]
    trainer.fit(module, loader_of(batches), loaders)
    together = [float(trainer.callback_metrics[f"val/loss/dataloader_idx_{i}"]) for i in (0, 1)]
    alone = [Trainer(**trainer_options).validate(module, loader, verbose=False)[0]["val/loss"] for loader in loaders]
    assert together == pytest.approx(alone)
    assert alone[0] != alone[1]
    assert len(trainer.test(module, loaders, verbose=False)) == 2
    for batch in batches:
        del batch["slot"], batch["key"]  # as from a datamodule that does not number its samples
    trainer.predict(module, loaders)
    names = [path.name for path in sorted((tmp_path / "images").glob("*.png"))]
    assert names == ["0-000000-.png", "0-000001-.png", "1-000000-.png", "1-000001-.png"]
