"""Optimizers of other packages by class_path: they train, and a resumed run goes on exactly."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from torch import Tensor

from lit_lora.adapters.parameter_groups import ParameterGroup, make_optimizer
from lit_lora.callbacks import AdapterCheckpoint, LoraInjection, ScheduleFree
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from tests.callbacks.foreign_modules import LanguageModel, sentences
from tests.helpers import Classifier, loader_of, make_batches

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch.optim.Adafactor": {"lr": 1e-2},
    "torch.optim.Muon": {"lr": 1e-3},
    "transformers.optimization.Adafactor": {"lr": 1e-3, "relative_step": False, "scale_parameter": False},
    "prodigyopt.Prodigy": {"lr": 1.0},
    "came_pytorch.CAME": {"lr": 1e-3},
    "bitsandbytes.optim.AdamW8bit": {"lr": 1e-3},
    "torchao.optim.AdamW8bit": {"lr": 1e-3},
}

IN_A_SMALL_MODULE: dict[str, dict[str, Any]] = {
    **{f"torch.optim.{name}": {"lr": 1e-2} for name in ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD")},
    **{f"torch.optim.{name}": {"lr": 1e-2} for name in ("NAdam", "RAdam", "RMSprop", "Rprop")},
    "torch.optim.SGD": {"lr": 1e-2, "momentum": 0.9, "nesterov": True},
    "transformers.optimization.Adafactor": {"lr": None},
    "schedulefree.AdamWScheduleFree": {"lr": 1e-2, "warmup_steps": 2},
    "schedulefree.RAdamScheduleFree": {"lr": 1e-2},
}


def fit(folder: Path, options: dict[str, Any], module: LightningModule, data: Any, epochs: int, **more: Any) -> None:
    torch.manual_seed(0)
    resume = more.pop("resume", None)
    saving = AdapterCheckpoint(folder, save_last=True, save_top_k=0, enable_version_counter=False)
    options = options | {"max_epochs": epochs, "enable_checkpointing": True}
    Trainer(**options, callbacks=[ScheduleFree(), *more.pop("callbacks", []), saving]).fit(
        module, data, ckpt_path=resume
    )


def trained(module: LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if "lora_" in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def made(name: str, options: dict[str, Any]) -> Any:
    """A function from parameters to their optimizer, by its class path."""
    package, _, kind = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages when they are imported
        pytest.importorskip(package.partition(".")[0])
        return partial(getattr(importlib.import_module(package), kind), **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_and_resumes(
    name: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    optimizer = made(name, OPTIMIZERS[name])

    def module() -> LoraDiffusion:
        adapter = LoraConfig(r=2, lora_alpha=2, target_modules="attention")
        return LoraDiffusion(StableDiffusion(str(sd_folder)), adapter, optimizer=optimizer, base_dtype="float32")

    whole, resumed, data = module(), module(), loader_of(make_batches(2))
    fit(tmp_path / "whole", trainer_options, whole, data, 3)
    fit(tmp_path / "first", trainer_options, module(), data, 1)
    fit(tmp_path / "first", trainer_options, resumed, data, 3, resume=tmp_path / "first" / "last.ckpt")
    assert same(trained(whole), trained(resumed))
    assert any(value.abs().max() > 0 for name, value in trained(whole).items() if "lora_B" in name)


@pytest.mark.parametrize("name", IN_A_SMALL_MODULE)
def test_an_optimizer_trains_and_resumes_in_a_small_module(
    name: str, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    class Module(Classifier):
        def configure_optimizers(self) -> Any:
            groups = [ParameterGroup("*.lora_B.*", lr_ratio=2)] if name.startswith("torch") else []
            return make_optimizer(made(name, IN_A_SMALL_MODULE[name]), self, groups)

    def run(folder: str, epochs: int, resume: Path | None = None) -> dict[str, Tensor]:
        module, injection = Module(), LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules=["0", "3"]))
        data = loader_of(make_batches(2))
        fit(tmp_path / folder, trainer_options, module, data, epochs, resume=resume, callbacks=[injection])
        return trained(module)

    whole, first = run("whole", 3), run("first", 1)
    assert same(whole, run("first", 3, tmp_path / "first" / "last.ckpt"))
    assert not any(torch.equal(value, first[key]) for key, value in whole.items())


class LoraFA(LanguageModel):
    """A module that trains with PEFT's LoRA-FA, which needs the adapted model."""

    def configure_optimizers(self) -> Any:
        injection = LoraInjection.of(self.trainer)
        assert injection is not None
        return create_lorafa_optimizer(model=injection.model, r=2, lora_alpha=2, lr=1e-2)


def test_an_optimizer_of_peft_in_a_module_of_its_own(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def run(folder: str, epochs: int, resume: Path | None = None) -> dict[str, Tensor]:
        module = LoraFA()
        injection = LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules="attention"), "model")
        fit(tmp_path / folder, trainer_options, module, sentences(), epochs, resume=resume, callbacks=[injection])
        return trained(module)

    whole, first = run("whole", 3), run("first", 1)
    resumed = run("first", 3, tmp_path / "first" / "last.ckpt")
    assert same(whole, resumed)
    assert all(torch.equal(value, whole[name]) == ("lora_A" in name) for name, value in first.items()), "A is frozen"


class Riemannian(LanguageModel):
    """A module with PEFT's optimizer that preconditions the gradients of pairs of matrices."""

    def configure_optimizers(self) -> Any:
        injection = LoraInjection.of(self.trainer)
        assert injection is not None
        return create_riemannian_optimizer(injection.model, torch.optim.AdamW, lr=1e-2)


def test_an_optimizer_of_peft_that_takes_no_closures(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    injection = LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules="attention"), "model")
    with pytest.raises(Exception, match="does not support closures"):
        fit(tmp_path, trainer_options, Riemannian(), sentences(), 1, callbacks=[injection])
