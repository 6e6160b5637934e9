"""Checks that a run's checkpoints will hold the adapter without the base, and can be read again."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_lora.errors import UserError


def check_hyperparameters(trainer: Trainer) -> None:
    """Check what ``save_hyperparameters`` of module and datamodule puts into checkpoints; warn of what cannot be read again.

    Args:
        trainer: Trainer whose module is loaded.

    Raises:
        UserError: If it is a module with weights, such as the family of a :class:`~lit_lora.LoraDiffusion`.
    """
    for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
        kept: dict[str, Any] = dict(getattr(owner, "hparams", None) or {})
        weights = [name for name, value in kept.items() if isinstance(value, nn.Module) and [*value.parameters()]]
        if weights:
            raise UserError(
                f"save_hyperparameters() of {type(owner).__name__} keeps {weights[0]}, whose weights each checkpoint would then "
                f"hold; leave it out: self.save_hyperparameters(ignore={weights})"
            )
        if others := [name for name, value in kept.items() if not _is_readable(value)]:
            rank_zero_warn(
                f"save_hyperparameters() of {type(owner).__name__} keeps objects that are read again only with "
                f"weights_only=False, which runs any code in a checkpoint; leave them out: "
                f"self.save_hyperparameters(ignore={others})"
            )


def _is_readable(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return False
    return True
