from __future__ import annotations

import warnings
from typing import Any

import pytest

from lit_lora.errors import UserError
from lit_lora.trainer_options import check_trainer_options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"gradient_clip_algorithm": "value"}, ["gradient_clip_algorithm='value' has no effect without"]),
        ({"gradient_clip_algorithm": "norm", "gradient_clip_val": 0}, ["'norm' has no effect without"]),
        ({"gradient_clip_algorithm": "norm", "gradient_clip_val": 0.5}, []),
        (
            {"overfit_batches": 3, "limit_train_batches": 0.5, "limit_val_batches": 2},
            [
                "limit_train_batches=0.5 has no effect beside trainer.overfit_batches=3",
                "limit_val_batches=2 has no effect beside trainer.overfit_batches=3",
            ],
        ),
        ({"overfit_batches": 0.0, "limit_train_batches": 5}, []),
        ({"overfit_batches": 2}, []),
        (
            {"min_steps": 10, "max_steps": 3},
            ["min_steps=10 has no effect beside trainer.max_steps=3, which ends the run"],
        ),
        ({"min_epochs": 2, "max_epochs": 1}, ["min_epochs=2 has no effect beside trainer.max_epochs=1"]),
        ({"min_epochs": 2, "max_epochs": -1, "min_steps": 3, "max_steps": 3}, []),
        ({}, []),
    ],
)
def test_options_without_effect_are_told(options: dict[str, Any], told: list[str]) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        check_trainer_options(options)
    assert len(shown) == len(told)
    assert all(line in str(one.message) for line, one in zip(told, shown, strict=True))


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("accumulate_grad_batches", 0, 1),
        ("check_val_every_n_epoch", 0, 1),
        ("gradient_clip_val", -1, 0),
        ("log_every_n_steps", -1, 0),
        ("min_steps", -1, 0),
        ("num_sanity_val_steps", -2, -1),
    ],
)
def test_values_below_a_bound_are_refused(option: str, value: int, least: int) -> None:
    check_trainer_options({option: least})
    with pytest.raises(UserError, match=rf"trainer\.{option}={value} is too small; it must be at least {least}"):
        check_trainer_options({option: value})


def test_validation_after_no_step_is_refused() -> None:
    for allowed in (1, 0.5, "00:01:00:00", None):
        check_trainer_options({"val_check_interval": allowed})
    for refused in (0, 0.0):
        with pytest.raises(UserError, match=r"val_check_interval=0 is too small; .*limit_val_batches=0 turns"):
            check_trainer_options({"val_check_interval": refused})
