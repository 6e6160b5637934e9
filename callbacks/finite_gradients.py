"""Skips optimizer steps whose loss or gradients are not finite."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed
from torch.optim import Optimizer

from lit_lora.argument_types import check_types
from lit_lora.distributed.collectives import gather
from lit_lora.errors import UserError, check_whole
from lit_lora.finite import any_non_finite, any_non_finite_gradient, damaged_base, non_finite_names, tensors_in
from lit_lora.loops import accumulating, begins_anew
from lit_lora.skipped_step import skip_step_where
from lit_lora.to_device import to_device
from lit_lora.visible import visible

_SCALER_STEPS = 16
"""Further steps in a row that ``precision: 16-mixed`` may skip while its scale falls from 65536 to 1."""

_KEYS_SHOWN = 8


class FiniteGradients(Callback):
    """Skips the optimizer steps of any LightningModule whose loss or gradients are NaN or Inf, and ends a run that stays so.

    A step is skipped in all processes if the loss or a gradient of any process is not finite. As with ``torch.amp.GradScaler``,
    it changes neither weights nor optimizer state: on the CPU, under DeepSpeed, with ``precision: 16-mixed``, and on GPUs with
    ``fused=True`` of Adam, AdamW, SGD and Adagrad. The decision is made on the GPU, and the host reads it one step later, so
    that it never waits for the step in progress. Other optimizers on GPUs therefore take the skipped step with gradients of
    zero: the weights move by momentum and weight decay, and the optimizer's averages shrink; nothing becomes NaN. With
    ``optimizer_in_backward``, parameters whose gradients were complete and finite before the bad one have taken the step.

    Every skipped step is a warning with the step, the loss and the samples' keys, and ``train/skipped_steps`` counts them.
    :class:`AdapterCheckpoint` saves nothing after a skipped step, so that earlier checkpoints stay. ``lit-lora fit`` adds this
    callback by default.

    Args:
        patience: Number of skipped steps in a row that ends the run; defaults to 5. With ``precision: 16-mixed`` 16 are
            added, since it skips steps to find the scale of the loss.

    Raises:
        UserError: If ``patience`` is below 1; during training, if that many steps in a row are skipped, or the last step is.
    """

    def __init__(self, patience: int = 5) -> None:
        check_types(FiniteGradients, locals())
        check_whole(1, patience=patience)
        self.patience = patience
        self.skipped = 0
        """Number of steps that were skipped in the whole run, also before it was resumed."""
        self.streak = 0
        """Steps that were skipped in a row, up to the last step whose result was read."""
        self._step: _Step | None = None
        self._unread: list[_Step] = []

    @classmethod
    def of(cls, trainer: Trainer) -> FiniteGradients | None:
        """The trainer's :class:`FiniteGradients`; None if it has none."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, cls)), None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and begins_anew(trainer):
            self.skipped = 0  # a checkpoint's number is restored after this

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.streak, self._step, self._unread = 0, None, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._step is None:
            self._step = _Step(trainer.global_step + 1)
        if isinstance(batch, dict):
            self._step.keys += [str(key) for key in batch.get("key", [])]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._step is not None:
            self._step.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if hasattr(trainer.strategy, "skipped_step"):  # it decides in its own step
            return
        step, self._step = self._step or _Step(trainer.global_step + 1), None
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flags = [any_non_finite(step.losses), any_non_finite_gradient(gradients)]
        if (backward := getattr(pl_module, "take_non_finite", _nothing)()) is not None:
            flags.append(backward)
        bad = torch.stack([to_device(flag, pl_module.device) for flag in flags]).any()
        if trainer.world_size > 1:
            number = bad.float()
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
            bad = number > 0
        skip_step_where(bad, optimizer, getattr(trainer.precision_plugin, "scaler", None) is not None)
        self.read(trainer, pl_module)
        self._unread.append(step.decided(bad))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        skipped: bool | None = getattr(trainer.strategy, "skipped_step", None)
        if skipped is not None and self._step is not None and not accumulating(trainer):
            self._unread.append(self._step.decided(torch.tensor(skipped)))
            self._step = None
            self.read(trainer, pl_module)
        if self.skipped:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.read(trainer, pl_module)
        if self.streak:
            raise self._error(trainer, pl_module, f"in the last {_steps(self.streak)} of the run")

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped} if self.skipped else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = int(state_dict.get("skipped", 0))

    def read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the steps that were taken, and count those that were skipped.

        Raises:
            UserError: If ``patience`` steps in a row were skipped.
        """
        unread, self._unread = self._unread, []
        for step in unread:
            if not step.was_skipped():
                self.streak = 0
                continue
            self.skipped += 1
            self.streak += 1
            self._last = step
            if self.streak >= self.patience + (_SCALER_STEPS if str(trainer.precision) == "16-mixed" else 0):
                raise self._error(trainer, pl_module, f"in {_steps(self.streak)} in a row")
            if trainer.is_global_zero or step.has_bad_loss():  # a process knows only its own samples
                warnings.warn(
                    f"optimizer step {step.number} is skipped: its loss or gradients are not finite; {step.found()}",
                    stacklevel=2,
                )

    def _error(self, trainer: Trainer, pl_module: LightningModule, where: str) -> UserError:
        rates = {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
        rate = ", ".join(f"{float(lr):g}" for lr in sorted(rates))
        # The weights of the base are looked at after an error alone: reading all of them at each start would take seconds.
        trained = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
        other = "remove samples that cause it"
        if names := non_finite_names(trained):
            other = (
                f"resume from an earlier checkpoint: {len(names)} trained tensors hold NaN or Inf, such as {names[0]}"
            )
        advice = damaged_base(pl_module) or f"lower lr, set trainer.gradient_clip_val to 1.0, or {other}"
        return UserError(
            f"training has diverged: loss or gradients were not finite {where}, up to step {self._last.number}, at lr {rate}; "
            f"{self._last.found()}; {advice}. Checkpoints saved before step "
            f"{self._last.number - self.streak + 1} are kept"
        )


@dataclass
class _Step:
    """What is known of one optimizer step."""

    number: int
    losses: list[Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def decided(self, bad: Tensor) -> _Step:
        """Begin to copy the decision to the host."""
        self._event = None
        if bad.is_cuda:
            self._bad = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._bad.copy_(bad, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._bad = bad
        return self

    def was_skipped(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._bad)

    def has_bad_loss(self) -> bool:
        return bool(any_non_finite(self.losses))

    def found(self) -> str:
        """The losses and the samples, for a message."""
        losses = ", ".join(f"{loss.item():g}" for loss in self.losses)
        keys = ", ".join(map(visible, self.keys[:_KEYS_SHOWN])) + (" …" if len(self.keys) > _KEYS_SHOWN else "")
        return f"loss {losses or 'unknown'}" + (f", samples {keys}" if keys else "")


def _nothing() -> None:
    """Replace a method that a module lacks."""


def _steps(count: int) -> str:
    return f"{count} steps" if count > 1 else "1 step"


def check_trained(trainer: Trainer) -> None:
    """Refuse to write weights or optimizer states that are not finite, in all processes alike; a collective call.

    Raises:
        UserError: If a value is NaN or Inf.
    """
    trained = ((name, p) for name, p in trainer.lightning_module.named_parameters() if p.requires_grad)
    named = {name: _own_part(parameter, trainer.global_rank) for name, parameter in trained}
    states = tensors_in([list(optimizer.state.values()) for optimizer in trainer.optimizers])
    found = [name for names in gather(non_finite_names(named) or non_finite_names(states)) for name in names]
    if found:
        advice = "resume from an earlier checkpoint with a lower lr or trainer.gradient_clip_val: 1.0"
        raise UserError(
            f"nothing is saved at step {trainer.global_step}: {len(found)} tensors of weights or optimizer state hold NaN or "
            f"Inf, the first is {found[0]}; {damaged_base(trainer.lightning_module) or advice}"
        )


def _own_part(parameter: Any, rank: int) -> Tensor:
    """What this process has of a parameter: under DeepSpeed's ZeRO-3 its shard, without the padding, which may hold anything."""
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    if shard is None:
        own: Tensor = parameter
        return own
    return shard.flatten()[: max(0, parameter.ds_numel - rank * shard.numel())]
