from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import AdaLoraConfig, PeftModel

from lit_lora.adapters import method_of
from lit_lora.callbacks import AdapterCheckpoint, LoraInjection
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from tests.helpers import Classifier, difference_in_plain_libraries, loader_of, make_batches

STEPS = 8

# A layer may lose all its ranks; PEFT takes that for a sharded save.
pytestmark = pytest.mark.filterwarnings("ignore:.*have invalid shape")


def adalora(**options: Any) -> AdaLoraConfig:
    schedule = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": STEPS, "lora_alpha": 6}
    return AdaLoraConfig(**schedule | options)


def fit(base: Path, folder: Path, options: dict[str, Any], steps: int, resume_at: int = 0) -> LoraDiffusion:
    torch.manual_seed(0)
    config = adalora(total_step=steps)
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


def test_a_layer_that_nobody_reads_loses_its_ranks(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    monkeypatch.setattr(StableDiffusion, "unread_layers", lambda self, part, model: [model.get_submodule(name)])
    module = fit(sd_folder, tmp_path, trainer_options, STEPS)
    layers = sum("lora_E" in name for name, _ in module.named_parameters())
    assert ranks(module) == 2 * layers
    layer: Any = module.family.denoiser.get_base_model().get_submodule(name)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not layer.lora_E["default"].any()


@pytest.mark.parametrize("at", [3, 7])
def test_adalora_resumes_exactly(at: int, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(sd_folder, tmp_path, trainer_options, STEPS)
    resumed = fit(sd_folder, tmp_path, trainer_options, STEPS, resume_at=at)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


class Positioned:
    """Batches that keep their position."""

    def __init__(self) -> None:
        self.batches, self.taken = make_batches(STEPS), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.taken < len(self.batches):
            self.taken += 1
            yield self.batches[self.taken - 1]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def test_asking_for_the_number_of_steps_does_not_lose_the_position_of_the_loader(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    def train(resume: Path | None = None) -> LoraDiffusion:
        torch.manual_seed(0)
        module = LoraDiffusion(StableDiffusion(str(sd_folder)), adalora(), base_dtype="float32")
        saving = AdapterCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        options = trainer_options | {"enable_checkpointing": True, "max_epochs": 1, "callbacks": [saving]}
        Trainer(**options).fit(module, Positioned(), ckpt_path=resume)
        return module

    whole, resumed = train(), train(tmp_path / "step=3.ckpt")
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_bytes_between_steps_are_those_of_the_averages(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    seen: list[tuple[int, int]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            method = method_of(pl_module.adapter)
            state = method.state(pl_module.family.denoiser)
            averages = [value for name, values in state.items() if name != "rank_pattern" for value in values.values()]
            seen.append((method.state_bytes(pl_module.family.denoiser), sum(value.nbytes for value in averages)))

    module = LoraDiffusion(StableDiffusion(str(sd_folder)), adalora(), base_dtype="float32")
    Trainer(**trainer_options | {"max_steps": STEPS, "callbacks": [Watch()]}).fit(
        module, loader_of(make_batches(STEPS))
    )
    expected, held = seen[3]
    assert 0 < expected == held


def test_the_penalty_is_the_distance_from_orthogonality(deep_sd_folder: Path) -> None:
    family = StableDiffusion(str(deep_sd_folder))
    family.load(torch.float32)
    config = adalora(target_modules=["to_q", "conv1"], orth_reg_weight=0.25)
    family.add_adapter(config)
    norms = []
    for name, p in family.denoiser.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append((gram - torch.eye(4)).square().sum().sqrt())
    found = method_of(config).penalty(family.denoiser)
    assert found is not None
    assert len(norms) == 32
    torch.testing.assert_close(found, 0.25 * torch.stack(norms).mean())


@pytest.mark.parametrize(("weight", "reached"), [(0.0, False), (10.0, True)])
def test_training_reduces_the_penalty(
    weight: float, reached: bool, sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = adalora(orth_reg_weight=weight, total_step=30)
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), config, base_dtype="float32")
    module.optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)
    Trainer(**trainer_options | {"max_steps": 30}).fit(module, loader_of(make_batches(30)))
    config.orth_reg_weight = 1.0
    module.family.denoiser.base_model.rankallocator.peft_config.orth_reg_weight = 1.0
    penalty = method_of(config).penalty(module.family.denoiser)
    assert penalty is not None
    assert (float(penalty.detach()) < 1.5) == reached  # it starts near 2, the norm of the identity


def test_the_schedule_is_that_of_the_trainer(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), adalora(total_step=1000), base_dtype="float32")
    with pytest.warns(UserWarning, match="follows the trainer's 8 optimizer steps; total_step=1000 is not used"):
        Trainer(**trainer_options | {"max_steps": STEPS}).fit(module, loader_of(make_batches(STEPS)))
    layers = sum("lora_E" in name for name, _ in module.named_parameters())
    assert ranks(module) == 2 * layers


def test_a_training_too_short_for_the_schedule_is_refused(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), adalora(), base_dtype="float32")
    with pytest.raises(
        UserError, match="first tinit=1 and the last tfinal=2 optimizer steps, and training takes 3 steps"
    ):
        Trainer(**trainer_options | {"max_steps": 3}).fit(module, loader_of(make_batches(3)))


def test_a_resumed_run_may_be_longer(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    fit(sd_folder, tmp_path, trainer_options, 4)
    module = fit(sd_folder, tmp_path, trainer_options, STEPS, resume_at=2)
    layers = sum("lora_E" in name for name, _ in module.named_parameters())
    assert ranks(module) == 2 * layers


@pytest.mark.parametrize("steps", [7, STEPS])
def test_a_run_that_has_pruned_may_be_longer(
    steps: int, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """The schedule would end again, at once where it needs importances that are gone."""

    def used(module: LoraDiffusion) -> dict[str, list[bool]]:
        return {name: (p != 0).flatten().tolist() for name, p in module.named_parameters() if "lora_E" in name}

    first = fit(sd_folder, tmp_path, trainer_options, 4)
    trained = {name: p.clone() for name, p in first.named_parameters() if "lora_A" in name}
    module = fit(sd_folder, tmp_path, trainer_options, steps, resume_at=4)
    assert module.trainer.global_step == steps
    assert used(module) == used(first)
    assert not all(torch.equal(p, trained[name]) for name, p in module.named_parameters() if "lora_A" in name)


def test_the_files_are_lora_that_draws_the_same_in_plain_diffusers(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = LoraDiffusion(
        StableDiffusion(str(sd_folder)), adalora(target_modules=["to_q", "to_v", "conv1"]), base_dtype="float32"
    )
    module.optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)
    Trainer(**trainer_options | {"max_steps": STEPS}).fit(module, loader_of(make_batches(STEPS)))
    module.save_adapter(tmp_path / "adapter")
    in_diffusers, in_peft, from_base = difference_in_plain_libraries(
        module.family.denoiser, sd_folder, tmp_path / "adapter"
    )
    assert in_diffusers <= 1e-5
    assert in_peft <= 1e-5
    assert from_base > 1e-4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    # Pruned ranks are not in the file; a layer without any keeps one.
    assert sum(config["rank_pattern"].values()) <= 2 * 24 + sum(rank == 1 for rank in config["rank_pattern"].values())


@pytest.mark.parametrize(("weight", "near"), [(0.0, False), (10.0, True)])
def test_in_a_module_of_another_project(
    weight: float, near: bool, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """The schedule, the penalty and the files are those of ``LoraDiffusion``."""
    module, steps = Classifier(), 30
    injection = LoraInjection(adalora(target_modules=["0", "3"], orth_reg_weight=weight, total_step=steps))
    trainer = Trainer(**trainer_options | {"max_steps": steps, "callbacks": [injection]})
    trainer.fit(module, loader_of(make_batches(steps)))
    assert ranks(module) == 2 * 2  # type: ignore[arg-type]
    injection.model.base_model.rankallocator.peft_config.orth_reg_weight = 1.0
    penalty = method_of(injection.adapter).penalty(injection.model)
    assert penalty is not None
    assert (float(penalty.detach()) < 1.5) == near
    injection.save_adapter(tmp_path / "adapter")
    loaded, values = PeftModel.from_pretrained(Classifier(), tmp_path / "adapter"), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert (loaded.net(values) - module.net(values)).abs().max() <= 1e-5
        assert (Classifier().net(values) - module.net(values)).abs().max() > 1e-3
    short = Trainer(**trainer_options | {"max_steps": 3, "callbacks": [LoraInjection(adalora(target_modules=["0"]))]})
    with pytest.raises(UserError, match="training takes 3 steps"):
        short.fit(Classifier(), loader_of(make_batches(3)))
