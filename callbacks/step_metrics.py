"""Logs learning rate, gradient norm and throughput."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_lora.batch_size import batch_size
from lit_lora.loops import accumulating
from lit_lora.profiling.phases import add_listener, remove_listener


class StepMetrics(Callback):
    """Logs ``train/lr``, ``train/gradient_norm`` and ``train/images_per_second`` of any LightningModule.

    They are logged at every ``trainer.log_every_n_steps``-th optimizer step, and nothing waits for the device at others. The rate
    is that of the optimizer's last parameter group, which holds the parameters that no ``parameter_groups`` take. The norm is the
    2-norm of all gradients together, before they are clipped; it is left out with ``optimizer_in_backward``, where the gradients
    never exist at once. The throughput is the number of samples that all processes have taken since the last logged step by the
    time since then, without validation and :class:`SampleImages`.
    ``lit-lora fit`` adds this callback by default.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._since: float | None = None
        """When the interval began, moved by the length of the pauses in it; None before the end of the first batch."""
        self._paused = 0.0
        self._lr = 0.0
        self._norm: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._samples, self._since, self._norm = 0, None, None
        add_listener(self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        remove_listener(self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        remove_listener(self)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume()

    def enter_phase(self, name: str) -> None:
        if name == "sampling":
            self._paused = time.monotonic()

    def leave_phase(self, name: str, failed: bool) -> None:
        if name == "sampling":
            self._resume()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._lr = learning_rate(optimizer)
        if _due(trainer, trainer.global_step + 1) and not hasattr(trainer.model, "get_global_grad_norm"):
            self._norm = _norm([p.grad for group in optimizer.param_groups for p in group["params"]])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += (batch_size(batch) or 0) * trainer.world_size
        due = _due(trainer, trainer.global_step) and not accumulating(trainer)
        figures = {"train/lr": self._lr} if due else {}
        if due and (norm := _norm_of_engine(trainer) if self._norm is None else self._norm) is not None:
            # It waits for the device, so that the time below is of whole steps.
            figures["train/gradient_norm"] = float(norm)
        now = time.monotonic()
        if due and self._since is not None and self._samples:
            figures["train/images_per_second"] = self._samples / (now - self._since)
        if due or self._since is None:  # the first batch takes longer than others
            self._samples, self._since, self._norm = 0, now, None
        for name, value in figures.items():
            pl_module.log(name, value, batch_size=1)

    def _resume(self) -> None:
        if self._since is not None:
            self._since += time.monotonic() - self._paused


def learning_rate(optimizer: Optimizer) -> float:
    """The learning rate of the last parameter group: that of the parameters which have none of their own."""
    return float(optimizer.param_groups[-1]["lr"])


def _due(trainer: Trainer, step: int) -> bool:
    """Whether the loggers take the values of this optimizer step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and step % every == 0


def _norm(gradients: list[Tensor | None]) -> Tensor | None:
    """The 2-norm of all gradients, on their device; None without gradients. FSDP2's shards take part by a collective call."""
    found = [gradient for gradient in gradients if gradient is not None]
    squares = [
        torch.nn.utils.get_total_norm(part).square()
        for kind in (True, False)
        if (part := [one for one in found if isinstance(one, DTensor) is kind])
    ]
    whole = [square.full_tensor() if isinstance(square, DTensor) else square for square in squares]
    return torch.stack(whole).sum().sqrt() if whole else None


def _norm_of_engine(trainer: Trainer) -> Any:
    """The norm that DeepSpeed has computed for its step; None under other strategies, and where it computes none."""
    norm = getattr(trainer.model, "get_global_grad_norm", None)
    return None if norm is None else norm()
