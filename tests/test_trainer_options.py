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
        ({}, []),
    ],
)
def test_options_without_effect_are_told(options: dict[str, Any], told: list[str]) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        check_trainer_options(options)
    assert len(shown) == len(told)
    assert all(line in str(one.message) for line, one in zip(told, shown, strict=True))


def test_values_below_a_bound_are_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches=0 is too small; it must be at least 1"):
        check_trainer_options({"accumulate_grad_batches": 0})
