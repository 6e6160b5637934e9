from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import AdaLoraConfig

from lit_lora.adapters import method_of
from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from tests.helpers import loader_of, make_batches

STEPS = 8

# A layer may lose all its ranks; PEFT takes that for a sharded save.
pytestmark = pytest.mark.filterwarnings("ignore:.*have invalid shape")


def fit(base: Path, folder: Path, options: dict[str, Any], steps: int, resume_at: int = 0) -> LoraDiffusion:
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=STEPS, lora_alpha=4)
    module = LoraDiffusion(StableDiffusion(str(base)), config, base_dtype="float32")
    module.optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)
    checkpoints = AdapterCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(**options | {"enable_checkpointing": True, "max_steps": steps, "callbacks": [checkpoints]})
    resume = str(folder / f"epoch=0-step={resume_at}.ckpt") if resume_at else None
    # Lightning does not rewind a plain list: what is left comes first, in a list as long as before.
    batches = make_batches(STEPS)
    trainer.fit(module, loader_of(batches[resume_at:] + batches[:resume_at]), ckpt_path=resume)
    return module


def ranks(module: LoraDiffusion) -> int:
    """Ranks in use over all adapted layers."""
    return sum(int((p != 0).sum()) for name, p in module.named_parameters() if "lora_E" in name)


def test_adalora_prunes_to_its_target(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = fit(sd_folder, tmp_path, trainer_options, STEPS)
    layers = sum("lora_E" in name for name, _ in module.named_parameters())
    assert ranks(module) == 2 * layers


@pytest.mark.parametrize("at", [3, 7])
def test_adalora_resumes_exactly(at: int, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(sd_folder, tmp_path, trainer_options, STEPS)
    resumed = fit(sd_folder, tmp_path, trainer_options, STEPS, resume_at=at)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_bytes_between_steps_are_those_of_the_averages(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module = fit(sd_folder, tmp_path, trainer_options, 4)
    method = method_of(module.adapter)
    state = method.state(module.family.denoiser)
    averages = [value for name, values in state.items() if name != "rank_pattern" for value in values.values()]
    assert averages
    assert method.state_bytes(module.family.denoiser) == sum(value.nbytes for value in averages)
