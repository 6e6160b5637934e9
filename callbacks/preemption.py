"""Stop where a signal asks for it, in a way that the run can go on from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from lit_lora.callbacks.adapter_checkpoint import AdapterCheckpoint

_ONE_SIGNAL_SECONDS = 3.0
"""Signals of a kind within this time are one: SLURM signals all processes, and torchrun hands on what it gets to the same."""


class Preemption(Callback):
    """On SIGTERM a fit of any LightningModule saves a checkpoint and ends; ``ckpt_path="last"`` goes on from there, bit for bit.

    A signal to any of the processes stops all of them after the next optimizer step, when the other callbacks are done with
    it: during validation or while pictures are drawn, and where validation or the end of an epoch is due, that is after
    the first step that follows. The checkpoint is ``last``
    of the trainer's :class:`AdapterCheckpoint`, else of its first ``ModelCheckpoint``, whatever its ``save_last`` and
    ``save_weights_only`` say; with no such callback nothing is saved. One line on the console says where it is. The exit
    status is 128 plus the signal's number, so 143 for SIGTERM. A second signal of the same kind, three seconds later or
    more, ends the process at once.

    Under SLURM the plugin's ``requeue_signal`` (SIGUSR1; ``#SBATCH --signal=USR1@120`` has it sent two minutes before the end)
    stops the run in the same way, and puts the job into the queue again unless the plugin has ``auto_requeue=False``.
    SIGTERM, which ``scancel`` sends, does not.

    Signals are handled in the main thread alone, from the start of training to its end. Lightning's own handlers, which save
    and communicate in the middle of a step, are not installed. ``lit-lora fit`` has this callback by default.
    """

    def __init__(self) -> None:
        self._received: dict[int, float] = {}
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            connector: Any = trainer._signal_connector
            connector.register_signal_handlers = lambda: self._listen(trainer)
            if _requeue_signal(trainer):  # which would end the process while it still loads the model
                self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Behind all other callbacks, those too that were added since: what they do at the end of a batch is saved.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [*(c for c in callbacks if c is not self), self]  # type: ignore[attr-defined]
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        # Between two optimizer steps the gradients so far would be lost, and with them the samples.
        if trainer.fit_loop._should_accumulate() or _more_is_due(trainer):
            return
        number = self._agree()
        if not number:
            return
        done = [f"stopped by {signal.Signals(number).name} at step {trainer.global_step}"]
        if path := _save_last(trainer):
            done.append(f"saved {path}; --ckpt_path last goes on from there")
        else:
            done.append("nothing is saved: the trainer has no checkpoint callback")
        if trainer.is_global_zero:
            if number == _requeue_signal(trainer):
                done.append(_requeue())
            print(f"lit-lora: {'; '.join(done)}", file=sys.stderr, flush=True)
        if self._group is not None:  # a launcher may kill the first process as soon as another ends
            distributed.barrier(self._group)
        raise SIGTERMException(_exit_status(trainer, number))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_listening(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_listening(trainer)

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in {signal.SIGTERM, _requeue_signal(trainer) or signal.SIGTERM}:
            before = signal.signal(number, self._receive)
            self._previous.setdefault(number, before)

    def _stop_listening(self, trainer: Trainer) -> None:
        connector: Any = trainer._signal_connector
        vars(connector).pop("register_signal_handlers", None)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        self._received = {}
        self._group = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._received.setdefault(number, now) > _ONE_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _agree(self) -> int:
        """The signal that any process has received, the same in all of them; 0 for none."""
        number = next(iter(self._received), 0)
        if self._group is None:
            return number
        largest = torch.tensor(number)  # on the CPU, so that nobody waits for a GPU
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group)
        return int(largest)


def _more_is_due(trainer: Trainer) -> bool:
    """Whether validation or the end of an epoch comes next, which a resumed run would pass over."""
    loop: Any = trainer.fit_loop.epoch_loop
    return bool(loop._should_check_val_fx(trainer.fit_loop._data_fetcher) or loop._num_ready_batches_reached())


def _save_last(trainer: Trainer) -> str | None:
    """Save everything where ``ckpt_path="last"`` looks, a collective call; None where there is no callback to do it."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    callbacks.sort(key=lambda callback: not isinstance(callback, AdapterCheckpoint))
    if not callbacks:
        return None
    checkpoint = callbacks[0]
    options = checkpoint.save_last, checkpoint.save_weights_only
    checkpoint.save_last, checkpoint.save_weights_only = True, False
    try:
        checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
    finally:
        checkpoint.save_last, checkpoint.save_weights_only = options
    return checkpoint.last_model_path


def _requeue_signal(trainer: Trainer) -> signal.Signals | None:
    environment = trainer._accelerator_connector.cluster_environment
    return (
        environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
    )


def _requeue() -> str:
    """Put this SLURM job into the queue again; says what came of it."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if job is None else f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        return f"job {job} is not in the queue again (scontrol: {error.strerror}); submit it again"
    if done.returncode:
        return f"job {job} is not in the queue again (scontrol: {done.stderr.strip()}); submit it again"
    return f"job {job} is in the queue again"


def _exit_status(trainer: Trainer, number: int) -> int:
    # Lightning's launcher kills the main process, and with it this status, when a process that it started ends with another.
    launched = (
        isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment) and trainer.local_rank
    )
    return 0 if launched else 128 + number
