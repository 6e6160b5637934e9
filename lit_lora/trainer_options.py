"""Options of the trainer that Lightning fails at, or that have no effect beside others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.errors import UserError, check_least

_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
}
"""Bounds of options that Lightning divides by, or that below them mean something else, as no clipping, without a word."""


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Check the values of a trainer's options; warn of those without effect.

    Args:
        options: Options of the trainer by name, such as ``accumulate_grad_batches``.

    Raises:
        UserError: If a value is below what can work.
    """
    for name, least in _LEAST.items():
        check_least(least, **{f"trainer.{name}": options.get(name)})
    if options.get("val_check_interval") == 0:
        raise UserError(
            "trainer.val_check_interval=0 is too small; give a number of steps, or a share of an epoch above 0; "
            "trainer.limit_val_batches=0 turns validation off"
        )
    for name in ("steps", "epochs"):
        lower, upper = options.get(f"min_{name}"), options.get(f"max_{name}")
        if lower is not None and upper is not None and -1 < upper < lower:
            rank_zero_warn(
                f"trainer.min_{name}={lower} has no effect beside trainer.max_{name}={upper}, which ends the run before; raise "
                f"max_{name}, or leave min_{name} out"
            )
    if (algorithm := options.get("gradient_clip_algorithm")) and not options.get("gradient_clip_val"):
        rank_zero_warn(
            f"trainer.gradient_clip_algorithm={algorithm!r} has no effect without trainer.gradient_clip_val: no gradients are "
            f"clipped; set it, or leave the algorithm out"
        )
    if overfit := options.get("overfit_batches"):
        for name in ("limit_train_batches", "limit_val_batches"):
            if (limit := options.get(name)) is not None:
                rank_zero_warn(
                    f"trainer.{name}={limit} has no effect beside trainer.overfit_batches={overfit}, which applies instead; "
                    f"leave one of them out"
                )
