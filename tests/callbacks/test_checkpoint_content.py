from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from peft import LoraConfig

from lit_lora.callbacks import AdapterCheckpoint, LoraInjection
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion


class Keeps(BoringModel):
    """A module that keeps all its arguments, as many projects do."""

    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.save_hyperparameters(kept)


def saved_by(module: LightningModule, options: dict[str, Any], folder: Path) -> str:
    saves = AdapterCheckpoint(folder)
    Trainer(**options | {"callbacks": [saves], "enable_checkpointing": True, "max_steps": 1}).fit(module)
    return saves.best_model_path


def test_hyperparameters_with_weights_are_refused(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="It is recommended to ignore them"):
        module = Keeps(width=3, backbone=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"keeps backbone, .*save_hyperparameters\(ignore=\['backbone'\]\)"):
        saved_by(module, trainer_options, tmp_path)
    assert not list(tmp_path.glob("*.ckpt"))


def test_hyperparameters_that_are_not_read_again_are_named(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    kept = {"width": 3, "names": ["a"], "adapter": LoraConfig(r=2), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    with pytest.warns(UserWarning, match=r"save_hyperparameters\(ignore=\['adapter', 'optimizer'\]\)"):
        path = saved_by(Keeps(**kept), trainer_options, tmp_path)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)


def test_plain_hyperparameters_are_kept(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        path = saved_by(Keeps(width=3, names=["a"], rate=None), trainer_options, tmp_path)
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"width": 3, "names": ["a"], "rate": None}


def swa() -> Callback:
    return StochasticWeightAveraging(1e-3)


INJECTION = partial(LoraInjection, LoraConfig(r=2, target_modules=["layer"]))


@pytest.mark.parametrize(
    "callbacks",
    [[AdapterCheckpoint, swa], [AdapterCheckpoint, EMAWeightAveraging], [INJECTION, swa]],
    ids=["checkpoint and SWA", "checkpoint and EMA", "injection and SWA"],
)
def test_averages_of_the_whole_module_are_refused(callbacks: list[Any], trainer_options: dict[str, Any]) -> None:
    options = trainer_options | {"enable_checkpointing": AdapterCheckpoint in callbacks, "max_epochs": 2}
    with pytest.raises(UserError, match=r"copies the whole module, .* use lit_lora\.AdapterEMA"):
        Trainer(**options, callbacks=[make() for make in callbacks]).fit(BoringModel())


def test_an_average_that_would_miss_the_adapter_is_refused(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="StochasticWeightAveraging copies the whole module"):
        Trainer(**trainer_options | {"max_epochs": 2}, callbacks=[swa()]).fit(sd_module, [])


@pytest.mark.parametrize("make", [AdapterCheckpoint, INJECTION], ids=["checkpoint", "injection"])
def test_pruning_of_the_base_is_refused(make: Any, trainer_options: dict[str, Any]) -> None:
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"])
    options = trainer_options | {"enable_checkpointing": make is AdapterCheckpoint}
    with pytest.raises(
        UserError, match=r"ModelPruning sets weights of the frozen base to zero, .* lit_lora\.RankBudget"
    ):
        Trainer(**options, callbacks=[pruning, make()]).fit(BoringModel())


def test_pruning_of_the_wrapped_base_is_refused(sd_module: LoraDiffusion, trainer_options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="ModelPruning sets weights of the frozen base to zero"):
        Trainer(**trainer_options, callbacks=[ModelPruning("l1_unstructured")]).fit(sd_module, [])


def test_an_average_with_checkpoints_of_the_whole_module_works(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path)
    options = trainer_options | {"enable_checkpointing": True, "max_steps": 1}
    with pytest.warns(UserWarning, match="overrides the configure_model callback"):
        Trainer(**options, callbacks=[INJECTION(), EMAWeightAveraging(), saves]).fit(BoringModel())
    assert "averaging_state" in torch.load(saves.best_model_path, weights_only=True)
