"""The validation loss of a run, held against the base's own."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.errors import UserError


class BaseLoss(Callback):
    """Measures the validation loss before the first step, which is the base's own, and prints each later one beside it.

    The loss goes to the loggers as step 0 of ``monitor``. It is that of Lightning's sanity check, which has to see all validation
    data: set the trainer's ``num_sanity_val_steps`` to -1. A resumed run has no sanity check; the loss is in its checkpoint. It
    works with any LightningModule that logs a validation loss.

    Args:
        monitor: Name of the validation loss. Defaults to ``val/loss``, that of :class:`~lit_lora.LoraDiffusion`.
    """

    def __init__(self, monitor: str = "val/loss") -> None:
        self.monitor = monitor
        self.base: float | None = None
        """The base's loss; None before it is measured."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.num_sanity_val_steps not in (-1, float("inf")):
            raise UserError(
                f"num_sanity_val_steps={trainer.num_sanity_val_steps} leaves out validation data, so that BaseLoss cannot "
                "measure the base; set trainer.num_sanity_val_steps to -1"
            )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get(self.monitor)
        if found is None:
            logged = ", ".join(sorted(trainer.callback_metrics))
            advice = f"set monitor to one of {logged}" if logged else "there are no validation data"
            rank_zero_warn(f"BaseLoss measured nothing, since the sanity check logged no {self.monitor}: {advice}")
            return
        self.base = float(found)
        # With those of its parts, as val/loss_q1.
        found_all = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(self.monitor)
        }
        for logger in trainer.loggers:
            logger.log_metrics(found_all, step=0)
        _print(trainer, f"step 0: {self.monitor} {self.base:.4f}, that of the base")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or found is None or (not trainer.training and trainer.state.fn != "fit"):
            return
        against = "" if self.base is None else f", {float(found) / self.base - 1:+.1%} against the base"
        _print(trainer, f"step {trainer.global_step:,}: {self.monitor} {float(found):.4f}{against}")

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base = state_dict["base"]


def _print(trainer: Trainer, line: str) -> None:
    """Print a line above the progress bar, once for all processes."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if bar is None:
        print(line)
    else:
        bar.print(line)
