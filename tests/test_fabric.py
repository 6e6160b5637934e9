from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from peft import LoraConfig
from safetensors.torch import load_file

from lit_lora.draws import Draws
from tests.helpers import diffusion_module, loader_of, make_batches


def test_steps_without_a_trainer_are_the_same_steps(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    batches = make_batches(2)
    trained = diffusion_module(sd_folder, LoraConfig(r=2, lora_alpha=2))
    Trainer(**trainer_options | {"max_steps": 2}).fit(trained, loader_of(batches))
    trained.save_adapter(tmp_path / "trainer")

    module = diffusion_module(sd_folder, LoraConfig(r=2, lora_alpha=2))
    module.configure_model()
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = module.optimizer([p for p in module.parameters() if p.requires_grad])
    model, optimizer = fabric.setup(module, optimizer)
    model.mark_forward_method("losses")
    for batch in fabric.setup_dataloaders(loader_of(batches)):
        losses, _ = model.losses(batch, Draws(module.seed, batch["slot"], fabric.device))
        fabric.backward(losses.mean())
        optimizer.step()
        optimizer.zero_grad()
    module.save_adapter(tmp_path / "fabric")

    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trainer", "fabric"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
