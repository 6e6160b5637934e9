"""Options of the trainer that Lightning fails at, or that have no effect beside others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.errors import check_least


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Check the values of a trainer's options; warn of those without effect.

    Args:
        options: Options of the trainer by name, such as ``accumulate_grad_batches``.

    Raises:
        UserError: If a value is below what can work.
    """
    # Lightning divides by the first, and takes the second for no clipping.
    for least, name in ((1, "accumulate_grad_batches"), (0, "gradient_clip_val")):
        check_least(least, **{f"trainer.{name}": options.get(name)})
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
