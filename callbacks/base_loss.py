"""The validation loss of a run, held against the base's own."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.argument_types import check_types
from lit_lora.errors import UserError
from lit_lora.formats.from_file import FromFile


class BaseLoss(Callback):
    """Measures the validation loss before the first step, which is the base's own, and prints each later one beside it.

    With :class:`FromFile` it is that of the adapter which training goes on with.

    The loss goes to the loggers as step 0 of ``monitor``. It is that of Lightning's sanity check, which has to see all validation
    data: set the trainer's ``num_sanity_val_steps`` to -1. A run that never falls below it says so at its end. A resumed run has
    no sanity check; the loss is in its checkpoint. It works with any LightningModule that logs a validation loss.

    Args:
        monitor: Name of the validation loss. Defaults to ``val/loss``, that of :class:`~lit_lora.LoraDiffusion`.
    """

    def __init__(self, monitor: str = "val/loss") -> None:
        check_types(BaseLoss, locals())
        self.monitor = monitor
        self.base: float | None = None
        """The base's loss; None before it is measured."""
        self.least: float | None = None
        """The least validation loss since; None before the first one."""

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
        self.base, self.least = float(found), None  # not of a fit before, in the same process
        # With those of its parts, as val/loss_q1.
        found_all = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(self.monitor)
        }
        for logger in trainer.loggers:
            logger.log_metrics(found_all, step=0)
        _print(trainer, f"step 0: {self.monitor} {self.base:.4f}, that of {_start(pl_module)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or found is None or (not trainer.training and trainer.state.fn != "fit"):
            return
        loss = float(found)
        self.least = loss if self.least is None else min(loss, self.least)
        against = "" if self.base is None else f", {loss / self.base - 1:+.1%} against {_start(pl_module)}"
        _print(trainer, f"step {trainer.global_step:,}: {self.monitor} {loss:.4f}{against}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.base is not None and self.least is not None and self.least >= self.base:
            _print(
                trainer,
                f"{self.monitor} never fell below that of {_start(pl_module)}, {self.base:.4f}: {self.least:.4f} at best",
            )

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base, "least": self.least}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base, self.least = state_dict["base"], state_dict.get("least")  # older checkpoints have the first alone


def _start(module: LightningModule) -> str:
    """What the first loss is that of: an adapter that goes on from files has changed the base before the first step."""
    return "the adapter at the start" if isinstance(getattr(module, "saved", None), FromFile) else "the base"


def _print(trainer: Trainer, line: str) -> None:
    """Print a line above the progress bar, once for all processes."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if bar is None:
        print(line)
    else:
        bar.print(line)
