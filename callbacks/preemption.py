"""Stopping a run on a signal so that it can be resumed."""

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
from lit_lora.callbacks.checkpoint_files import options
from lit_lora.distributed.collectives import time_limit
from lit_lora.loops import accumulating, is_over, more_is_due, validated_in_epoch
from lit_lora.signals import ONE_SIGNAL_SECONDS, end_at_once

_STOPPING = (
    f"\nlit-lora: saving after this step; Ctrl-C again, after {ONE_SIGNAL_SECONDS:.0f} s, stops at once\n".encode()
)


class Preemption(Callback):
    """Saves a checkpoint and ends the fit of any LightningModule on SIGTERM or Ctrl-C; ``ckpt_path="last"`` resumes it.

    The resumed run equals one that was not stopped as far as :class:`AdapterCheckpoint` says, which depends on the loader.

    A signal to any process stops all processes after the next optimizer step, once the other callbacks have handled that step.
    The end of an epoch is completed first; so are validation and sampling. The checkpoint is the ``last`` of the trainer's
    :class:`AdapterCheckpoint`, or of its first ``ModelCheckpoint``, regardless of its ``save_last`` and ``save_weights_only``;
    without such a callback nothing is saved. One line on the console says where the checkpoint is.
    The exit status is 128 plus the number of the signal, so 143 for SIGTERM and 130 for Ctrl-C. A second signal of the same kind,
    three seconds or more after the first, ends the process at once; so does Ctrl-C before the first step, when there is nothing
    to save.

    Under SLURM the ``requeue_signal`` of the plugin (SIGUSR1; ``#SBATCH --signal=USR1@120`` sends it two minutes before the time
    limit) stops the run in the same way and requeues the job, unless the plugin has ``auto_requeue=False``. SIGTERM, which
    ``scancel`` sends, does not requeue it.

    Signals are handled in the main thread only, from the start of training to its end. Lightning's own handlers, which save and
    communicate in the middle of a step, are not installed. ``lit-lora fit`` adds this callback by default.
    """

    def __init__(self) -> None:
        self.advice = "resume with --ckpt_path last"
        """How the run is gone on with; ``lit-lora train`` has no option for it."""
        self._received: dict[int, float] = {}
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self._first_step = 0
        self._process = 0
        self._tells = False
        self._has_trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            connector: Any = trainer._signal_connector
            connector.register_signal_handlers = lambda: self._listen(trainer)
            if _requeue_signal(trainer):  # without a handler it would end the process before training starts
                self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Moved behind all other callbacks, so that the checkpoint contains what they do at the end of a batch.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [*(c for c in callbacks if c is not self), self]  # type: ignore[attr-defined]
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo", timeout=time_limit(trainer.strategy))
        self._first_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._first_step:  # the epoch before has ended with a step
            self._stop_if_asked(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._has_trained = trainer.global_step > self._first_step
        # A checkpoint between two optimizer steps would lose the accumulated gradients, and so their samples.
        if not accumulating(trainer) and not more_is_due(trainer) and not is_over(trainer):
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where each step is followed by validation, no end of a batch can stop the run.
        if validated_in_epoch(trainer) and not accumulating(trainer) and not is_over(trainer):
            self._stop_if_asked(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_listening(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_listening(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Save and end the run if any process has received a signal; a collective call."""
        number = self._agree()
        if not number:
            return
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        done = [f"stopped by {name} at step {trainer.global_step}"]
        if path := _save_last(trainer):
            done.append(f"saved {path}; {self.advice}")
        else:
            done.append("nothing was saved, since the trainer has no checkpoint callback")
        if trainer.is_global_zero:
            if number == _requeue_signal(trainer):
                done.append(_requeue())
            print(f"lit-lora: {'; '.join(done)}", file=sys.stderr, flush=True)
        if self._group is not None:  # a launcher may kill the first process as soon as another one ends
            distributed.barrier(self._group)
        raise SIGTERMException(_exit_status(trainer, number))

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._process, self._tells = os.getpid(), trainer.is_global_zero
        numbers = {signal.SIGTERM, _requeue_signal(trainer) or signal.SIGTERM}
        # Not where it is ignored, as in the background of a script, or somebody else's.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.add(signal.SIGINT)
        for number in numbers:
            before = signal.signal(number, self._receive)
            self._previous.setdefault(number, before)

    def _stop_listening(self, trainer: Trainer) -> None:
        connector: Any = trainer._signal_connector
        vars(connector).pop("register_signal_handlers", None)
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._receive:  # Lightning ignores Ctrl-C while it shuts down
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        self._received = {}
        self._group, self._has_trained = None, False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = now - self._received.setdefault(number, now) > ONE_SIGNAL_SECONDS
        if number != signal.SIGINT:
            if again:
                end_at_once(number)
        elif (
            os.getpid() == self._process
        ):  # a terminal's Ctrl-C reaches the loader's processes too, which are still needed
            if again or not self._has_trained:
                signal.default_int_handler(number, frame)
            if self._tells and self._received[number] == now:
                os.write(2, _STOPPING)  # print() cannot be called while it is being called

    def _agree(self) -> int:
        """Number of a signal that any process has received, equal on all processes; 0 for none."""
        number = next(iter(self._received), 0)
        if self._group is None:
            return number
        largest = torch.tensor(number)  # on the CPU, so that no GPU is synchronised
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group)
        return int(largest)


def _save_last(trainer: Trainer) -> str | None:
    """Save the ``last`` checkpoint and return its path, or None without a checkpoint callback; a collective call."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    callbacks.sort(key=lambda callback: not isinstance(callback, AdapterCheckpoint))
    if not callbacks:
        return None
    checkpoint = callbacks[0]
    if isinstance(checkpoint, AdapterCheckpoint):
        return checkpoint.save_now(trainer)
    with options(checkpoint, save_last=True, save_weights_only=False):
        checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
    return checkpoint.last_model_path


def _requeue_signal(trainer: Trainer) -> signal.Signals | None:
    environment = trainer._accelerator_connector.cluster_environment
    return (
        environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
    )


def _requeue() -> str:
    """Requeue this SLURM job and return a sentence about the result."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ["SLURM_JOB_ID"] if job is None else f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        return f"job {job} could not be requeued (scontrol: {error.strerror}); submit it again"
    if done.returncode:
        return f"job {job} could not be requeued (scontrol: {done.stderr.strip()}); submit it again"
    return f"job {job} is requeued"


def _exit_status(trainer: Trainer, number: int) -> int:
    # If a launched process ends with a status other than 0, Lightning kills the main process, whose status is the run's.
    launched = (
        isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment) and trainer.local_rank
    )
    return 0 if launched else 128 + number
