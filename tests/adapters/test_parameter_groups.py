"""Parameters with a learning rate and weight decay of their own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, Rprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, PolynomialLR
from transformers.optimization import Adafactor

from lit_lora.adapters import inject
from lit_lora.adapters.parameter_groups import ParameterGroup, check_schedule, make_optimizer
from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.lightning_cli import build_cli
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from tests.helpers import loader_of, make_batches, tiny_unet

ADAMW = partial(AdamW, lr=1e-2, weight_decay=0.1)
GROUPS = (ParameterGroup("denoiser.mid_block.*", lr=1e-3, weight_decay=0.0), ParameterGroup("*.lora_B.*", lr_ratio=16))


def module_of(folder: Path, **options: Any) -> LoraDiffusion:
    options.setdefault("optimizer", ADAMW)
    options.setdefault("parameter_groups", GROUPS)
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules="attention")
    return LoraDiffusion(StableDiffusion(str(folder)), adapter, base_dtype="float32", **options)


def fit(
    module: LoraDiffusion, options: dict[str, Any], epochs: int = 2, resume: Path | None = None, **more: Any
) -> Trainer:
    """Train epochs of two steps each."""
    torch.manual_seed(0)
    trainer = Trainer(**options | {"max_epochs": epochs} | more)
    trainer.fit(module, loader_of(make_batches(2)), ckpt_path=resume)
    return trainer


def saving(folder: Path, **options: Any) -> dict[str, Any]:
    callback = AdapterCheckpoint(folder, save_last=True, save_top_k=0, enable_version_counter=False, **options)
    return {"callbacks": [callback], "enable_checkpointing": True}


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_each_parameter_is_in_the_first_group_that_matches(sd_folder: Path) -> None:
    module = module_of(sd_folder)
    module.configure_model()
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, Optimizer)
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (1e-3, 0.0),
        (16 * 1e-2, 0.1),
        (1e-2, 0.1),
    ]
    assert all("mid_block" in name for name in groups[0])
    assert {name.split(".")[-3] for name in groups[0]} == {"lora_A", "lora_B"}
    assert {name.split(".")[-3] for name in groups[1]} == {"lora_B"}
    assert {name.split(".")[-3] for name in groups[2]} == {"lora_A"}
    assert sum(map(len, groups)) == len(trained(module))


def test_lora_plus_is_that_of_peft() -> None:
    weights = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = inject(tiny_unet(), LoraConfig(r=2, lora_alpha=2, target_modules="attention"), ())
        if ours:
            optimizer = make_optimizer(
                partial(AdamW, lr=1e-2, weight_decay=0.1), model, [ParameterGroup("*.lora_B.*", lr_ratio=16)]
            )
        else:
            optimizer = create_loraplus_optimizer(
                model, AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
            )
        for _ in range(3):
            loss = model(torch.ones(1, 4, 8, 8), torch.tensor([7]), torch.ones(1, 5, 16)).sample.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(trained(model))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_groups_of_an_optimizer_without_weight_decay() -> None:
    optimizer = make_optimizer(partial(Rprop, lr=0.1), nn.Linear(1, 1), [ParameterGroup("bias", lr_ratio=2)])
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParameterGroup("*"), "'\\*' sets nothing"),
        (lambda: ParameterGroup("*", lr=1, lr_ratio=2), "has both lr=1 and lr_ratio=2"),
        (lambda: ParameterGroup("*", weight_decay=-1), "weight_decay=-1 is too small; it must be at least 0"),
        (
            lambda: make_optimizer(ADAMW, nn.Linear(1, 1), [ParameterGroup("lora*", lr=1)]),
            r"matches no trained parameter.*weight",
        ),
        (
            lambda: make_optimizer(ADAMW, nn.Linear(1, 1), [ParameterGroup("*", lr=1), ParameterGroup("bias", lr=2)]),
            "'bias' matches only parameters that earlier groups have",
        ),
        (
            lambda: make_optimizer(Rprop, nn.Linear(1, 1), [ParameterGroup("bias", weight_decay=1)]),
            "Rprop has no weight_decay",
        ),
        (
            lambda: make_optimizer(partial(Adafactor, lr=None), nn.Linear(1, 1), [ParameterGroup("bias", lr_ratio=2)]),
            "lr_ratio=2 multiplies the lr of Adafactor, which is null",
        ),
        (
            lambda: make_optimizer(Prodigy, nn.Linear(1, 1), [ParameterGroup("bias", lr_ratio=2)]),
            r"Prodigy finds one step size for all parameters, and the lr of parameter_groups are \[1.0, 2.0\]",
        ),
    ],
)
def test_groups_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("groups", [[], [ParameterGroup("weight", lr=1.0)]])
def test_an_optimizer_that_refuses_a_value(groups: list[ParameterGroup]) -> None:
    with pytest.raises(UserError, match=r"refuses a value: Invalid beta .* 1: 1.5; correct model.optimizer"):
        make_optimizer(partial(AdamW, betas=(0.9, 1.5)), nn.Linear(1, 1), groups)


def test_prodigy_takes_groups_that_are_not_trained() -> None:
    optimizer = make_optimizer(Prodigy, nn.Linear(1, 1), [ParameterGroup("bias", lr=0)])
    assert [group["lr"] for group in optimizer.param_groups] == [0, 1.0]


def test_all_parameters_may_be_in_groups() -> None:
    optimizer = make_optimizer(partial(Adagrad, lr=0.1), nn.Linear(1, 1), [ParameterGroup("*", lr_ratio=0.5)])
    assert [group["lr"] for group in optimizer.param_groups] == [0.05]


def test_schedules(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    linear = module_of(sd_folder, lr_scheduler=partial(LinearLR, start_factor=0.5, total_iters=8))
    trainer = fit(linear, trainer_options)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([7.5e-4, 0.12, 7.5e-3])
    one_for_all = module_of(sd_folder, lr_scheduler=partial(OneCycleLR, max_lr=0.1, total_steps=9))
    with pytest.raises(UserError, match=r"OneCycleLR gives all 3 parameter groups the learning rate 0\.004"):
        fit(one_for_all, trainer_options)
    fit(module_of(sd_folder, lr_scheduler=partial(OneCycleLR, max_lr=[0.1, 0.2, 0.3], total_steps=9)), trainer_options)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            partial(CosineAnnealingLR, T_max=3),
            "CosineAnnealingLR rises again after T_max=3 of 4 optimizer steps; set T_max to 4",
        ),
        (partial(PolynomialLR, total_iters=3), "PolynomialLR stays at 0 after total_iters=3 of 4 optimizer steps"),
    ],
)
def test_schedules_that_end_before_the_training(make: Any, told: str) -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for steps in (-1, 3):
        check_schedule([0.1], optimizer, make(optimizer), steps)  # a warning would be an error
    with pytest.warns(UserWarning, match=told):
        check_schedule([0.1], optimizer, make(optimizer), 4)


def test_a_period_of_no_steps_is_refused() -> None:
    # CosineAnnealingLR divides by it at its first step.
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(UserError, match="lr_scheduler T_max=0 is too small; it must be at least 1"):
        check_schedule([0.1], optimizer, CosineAnnealingLR(optimizer, T_max=0))


def test_resuming_with_groups(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    schedule: dict[str, Any] = {"lr_scheduler": partial(LinearLR, start_factor=0.5, total_iters=8)}
    whole, resumed = (module_of(sd_folder, **schedule) for _ in range(2))
    fit(whole, trainer_options)
    fit(module_of(sd_folder, **schedule), trainer_options, 1, **saving(tmp_path))
    last = tmp_path / "start.ckpt"
    (tmp_path / "last.ckpt").rename(last)
    fit(resumed, trainer_options, resume=last, **saving(tmp_path))
    expected, found = trained(whole), trained(resumed)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())

    other = (ParameterGroup("denoiser.mid_block.*", lr=1e-3, weight_decay=0.5), GROUPS[1])
    with pytest.warns(UserWarning, match=r"group 0: weight_decay 0\.0 in the checkpoint, 0\.5 here"):
        fit(module_of(sd_folder, parameter_groups=other, **schedule), trainer_options, resume=last, **saving(tmp_path))
    changed = module_of(sd_folder, parameter_groups=other, **schedule)
    trainer = fit(changed, trainer_options, resume=last, **saving(tmp_path, keep_optimizer_settings=False))
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.5, 0.1, 0.1]


@pytest.mark.filterwarnings("ignore:the checkpoint's optimizer settings stay")
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((ParameterGroup("denoiser.up_blocks.*", lr=1e-3, weight_decay=0), GROUPS[1]), "in another group than group 0"),
        ((), "parameters in 3 groups, here are .* in 1"),
    ],
)
def test_resuming_with_other_groups(
    groups: tuple[ParameterGroup, ...],
    message: str,
    deep_sd_folder: Path,
    trainer_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    fit(module_of(deep_sd_folder), trainer_options, 1, **saving(tmp_path))
    with pytest.raises(UserError, match=message):
        fit(
            module_of(deep_sd_folder, parameter_groups=groups),
            trainer_options,
            resume=tmp_path / "last.ckpt",
            **saving(tmp_path),
        )


def test_steps_in_the_backward_pass_keep_the_groups(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    one, other = module_of(sd_folder), module_of(sd_folder, memory=MemoryOptions(optimizer_in_backward=True))
    for module in (one, other):
        fit(module, trainer_options)
    expected, found = trained(one), trained(other)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_config_has_groups(deep_sd_folder: Path, tmp_path: Path) -> None:
    groups = [{"pattern": "*.lora_B.*", "lr_ratio": 4}, {"pattern": "denoiser.up_blocks.*", "lr": 0, "weight_decay": 0}]
    model = {
        "family": {
            "class_path": "StableDiffusion",
            "init_args": {"pretrained_model_name_or_path": str(deep_sd_folder)},
        },
        "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2, "lora_alpha": 2}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "weight_decay": 0.1}},
        "parameter_groups": groups,
    }
    data = {"class_path": "WebDatasetDataModule", "init_args": {"train_shards": str(tmp_path)}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"model": model, "data": data}))
    module = build_cli(["fit", "--config", str(path), "--trainer.accelerator", "cpu"], run=False).model
    overlay = Path(__file__).parents[2] / "configs" / "overlays" / "text_encoders.yaml"
    arguments = ["fit", "--config", str(path), "--config", str(overlay), "--trainer.accelerator", "cpu"]
    patterns = [group.pattern for group in build_cli(arguments, run=False).model.parameter_groups]
    assert patterns == ["*.lora_B.*", "denoiser.up_blocks.*", "text_encoder*"]  # the overlay adds its own
    module.configure_model()
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, SGD)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (2.0, 0.1),
        (0, 0),
        (0.5, 0.1),
    ]
