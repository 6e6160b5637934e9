from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoHaConfig, LoraConfig, OFTConfig

from lit_lora.datamodules import ShardSet, WebDatasetDataModule
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion, prepare
from lit_lora.module import LoraDiffusion
from lit_lora.objectives import DDPM, PriorPreservation
from lit_lora.run_checks import check_data, check_run
from tests.helpers import loader_of, make_batches


class Counting(Callback):
    """Counts the validations of training."""

    def __init__(self) -> None:
        self.count = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.count += not trainer.sanity_checking


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 3},
        {"max_steps": 4},
        {"max_steps": 3, "val_check_interval": 3},
        {"max_steps": 3, "val_check_interval": 0.5},
        {"max_steps": 1, "val_check_interval": 2},
        {"max_steps": 6, "check_val_every_n_epoch": 2},
        {"max_epochs": 1, "max_steps": -1, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "max_steps": -1, "check_val_every_n_epoch": 2},
        {"max_steps": 5, "val_check_interval": 6, "check_val_every_n_epoch": None},
        {"max_steps": 6, "val_check_interval": 6, "check_val_every_n_epoch": None},
        {"max_steps": 1, "accumulate_grad_batches": 3},
        {"max_steps": 2, "accumulate_grad_batches": 3},
        {"max_steps": 4, "limit_val_batches": 0},
    ],
    ids=str,
)
def test_a_run_that_never_validates_says_so(
    options: dict[str, Any], sd_module: LoraDiffusion, trainer_options: dict[str, Any]
) -> None:
    counting, batches = Counting(), loader_of(make_batches(4))
    trainer = Trainer(**trainer_options | {"num_sanity_val_steps": 0, "callbacks": [counting]} | options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(sd_module, batches, batches)
    told = [str(one.message) for one in caught if "never validates" in str(one.message)]
    assert bool(told) == (counting.count == 0)


def test_the_warning_names_the_setting(sd_module: LoraDiffusion, trainer_options: dict[str, Any]) -> None:
    batches = loader_of(make_batches(4))
    with pytest.warns(
        UserWarning, match=r"first validation would come after 8 .* at most 3, and check_val_every_n_epoch to 1"
    ):
        Trainer(**trainer_options | {"max_steps": 3, "check_val_every_n_epoch": 2}).fit(sd_module, batches, batches)


def test_held_out_samples_are_named_and_data_without_them_cause_no_warning(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], session_shards: Path
) -> None:
    options = trainer_options | {"max_steps": 1, "limit_val_batches": 0}
    data: dict[str, Any] = {"batch_size": 1, "resolution": 16, "num_workers": 0}
    with pytest.warns(UserWarning, match="what val_samples=2 holds out is not trained on either"):
        Trainer(**options).fit(sd_module, WebDatasetDataModule(str(session_shards), val_samples=2, **data))
    Trainer(**options).fit(sd_module, WebDatasetDataModule(str(session_shards), **data))


@pytest.mark.parametrize(
    ("method", "strategy", "stage", "refused"),
    [
        (LoHaConfig, "ddp", "fit", True),
        (LoHaConfig, "ddp", "test", False),
        (LoHaConfig, "ddp_find_unused_parameters_true", "fit", False),
        (OFTConfig, "ddp", "fit", False),
    ],
)
def test_ddp_needs_a_gradient_of_each_layer(
    method: Any, strategy: str, stage: str, refused: bool, sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    adapter = method(target_modules=["to_q"], module_dropout=0.2)
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), adapter, base_dtype="float32")
    module.trainer = Trainer(**trainer_options | {"strategy": strategy, "devices": 2})
    with (
        pytest.raises(UserError, match="ddp_find_unused_parameters_true, or module_dropout")
        if refused
        else nullcontext()
    ):
        check_run(module, stage)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (None, "prior: true, and the objective has no prior; set model.objective.init_args.prior"),
        (
            PriorPreservation("class/*"),
            r"prior: true, and class_keys='class/\*' of the objective's prior would count instead",
        ),
        (PriorPreservation(), None),
    ],
)
def test_sets_of_class_images_are_those_that_the_objective_asks_for(
    prior: PriorPreservation | None, message: str | None, sd_folder: Path
) -> None:
    module: Any = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2), DDPM(prior=prior))
    prepare(module.family, module.objective)
    data = WebDatasetDataModule(train_sets=[ShardSet("a"), ShardSet("b", prior=True)], resolution=16)
    module._trainer = SimpleNamespace(datamodule=data, training=False)
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_data(module)
