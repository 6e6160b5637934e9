"""Lightning's ``EarlyStopping`` across runs: what it has ended, and what a resumed run takes over from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn


def stopped_early(trainer: Trainer) -> str | None:
    """What ``EarlyStopping`` found that has ended a training; None if something else has ended it.

    Args:
        trainer: Trainer whose training has ended.
    """
    if not trainer.should_stop or trainer.global_step >= trainer.max_steps > 0:
        return None
    found = (one.stopping_reason_message for one in _of(trainer))
    return next((_reason(message) for message in found if message), None)


class ResumedEarlyStopping(Callback):
    """Has ``EarlyStopping`` take its patience from the config, not from the checkpoint, and tells of a run that it had ended."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for callback in _of(trainer):
            if (state := checkpoint.get("callbacks", {}).get(callback.state_key)) is None:
                continue
            ended = _reason(state.get("stopping_reason_message") or "")
            if ended and state["wait_count"] >= callback.patience and trainer.state.fn == TrainerFn.FITTING:
                rank_zero_warn(
                    f"early stopping has ended this run at step {checkpoint['global_step']} ({ended}): it is resumed, and the "
                    f"next validation ends it again unless {callback.monitor} is better; raise patience, which is "
                    f"{callback.patience}, to train on, or take the adapter that is saved"
                )
            state |= {
                "patience": callback.patience,
                "stopping_reason": callback.stopping_reason.value,
                "stopping_reason_message": None,
            }


def _of(trainer: Trainer) -> Iterator[EarlyStopping]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return (one for one in callbacks if isinstance(one, EarlyStopping))


def _reason(message: str) -> str:
    """Lightning's reason, without what it says to itself."""
    return message.replace("Signaling Trainer to stop.", "").strip().rstrip(".")
