"""Profile of a run's memory by phase and by kind."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_lora.argument_types import check_types
from lit_lora.callbacks.logged_image import log_image
from lit_lora.callbacks.planned_advice import planned_advice
from lit_lora.distributed.collectives import gather
from lit_lora.errors import UserError, check_whole
from lit_lora.files import atomic_file
from lit_lora.profiling.advice import general_advice, sorted_advice
from lit_lora.profiling.chart import memory_chart
from lit_lora.profiling.kinds import MemoryKinds
from lit_lora.profiling.meter import CudaMeter, MemoryMeter, meter_of
from lit_lora.profiling.out_of_memory import is_out_of_memory
from lit_lora.profiling.phases import add_listener, remove_listener
from lit_lora.profiling.record import BETWEEN, MemoryRecord, PhaseMemory, divide
from lit_lora.profiling.report import profile_report, profile_text, profile_title
from lit_lora.run_folder import run_folder

_LOG = logging.getLogger(__name__)

_FIRST_STEPS = 2
"""Number of steps at the start that are always measured; the second is the first that begins with optimizer state."""


class MemoryProfiler(Callback):
    """Measures the memory of any LightningModule's run, by phase and by kind.

    Phases are load, forward, backward, optimizer, validation, test, predict, and those that the code names with
    :func:`lit_lora.profiling.phases.phase` (:class:`SampleImages` names "sampling"); of nested phases the innermost is measured.
    ``between`` is everything else: loading data, saving, and the steps that are not measured in detail. It is always measured
    as one phase, so that the highest peak of the run is known.

    On CUDA the figures are PyTorch's allocated and reserved memory, whose peak statistics are reset at the beginning of each
    phase; elsewhere they are the resident memory of the process.

    The kinds frozen weights (with buffers), adapter (all trained parameters), gradients and optimizer state are the tensors on
    the training device at the end of the phase, each storage counted once. "other" is the rest of the memory in use before a
    step begins; on the CPU it contains libraries and freed memory that the process keeps. "activations" is the memory that a
    phase takes beyond these.

    At the end a table is printed, and ``memory.json`` and the chart ``memory.png`` are written (``memory-test.json`` and so
    on after stages other than fit). Loggers get ``memory_mib/peak/PHASE`` and, for the phase with the highest peak of a measured
    step, ``memory_mib/kind/KIND``; TensorBoard also gets the chart. With several processes these are the figures of the first,
    and the text lists the peak of each process.

    At an out-of-memory error the same files are written, also by processes other than the first (``memory-rank1.json``),
    together with the phase and the changes that save memory, largest saving first. For a :class:`~lit_lora.LoraDiffusion` the
    changes are config keys with the savings that the planner predicts. Another module may have a method
    ``memory_advice(kinds) -> list[tuple[str, int]]``, which receives bytes by kind and returns changes with the bytes that each
    would save. On CUDA ``memory_summary.txt`` holds PyTorch's own summary.

    ``memory.json`` has ``schema`` (1), ``status`` (finished, interrupted, failed, out of memory), ``stage``, ``device``,
    ``device_name``, ``note`` (what the figures leave out, or null), ``versions``, ``options``, ``baseline`` (bytes in use
    before the model was loaded, without the module's own), ``peak`` (``phase``, ``step``, ``bytes``), ``ranks`` (highest peak
    of each process; null after an error), ``phases`` (by name: ``peak`` and ``end``, each by measure, ``kinds`` at the peak,
    ``step``, ``count``) and ``out_of_memory`` (null, or ``phase``, ``message``, ``kinds``, ``advice``). All sizes are bytes.

    Args:
        every_n_steps: Optimizer steps between two measured steps. Defaults to 50. The first two steps of the run are always
            measured. A phase outside steps is measured at most once in this many steps, validation always.
        output_dir: Folder for the files. Defaults to the run's folder, in which ``checkpoints`` is too.
        snapshot_entries: Number of allocator events to record on CUDA; at an out-of-memory error they are written to
            ``memory_snapshot.pickle`` (for https://pytorch.org/memory_viz). Defaults to 0, which records none.

    Raises:
        UserError: If ``every_n_steps`` is below 1 or ``snapshot_entries`` below 0; once the run starts, if the trainer has
            another of these callbacks.
    """

    def __init__(self, every_n_steps: int = 50, output_dir: str | None = None, snapshot_entries: int = 0) -> None:
        check_types(MemoryProfiler, locals())
        check_whole(1, every_n_steps=every_n_steps)
        check_whole(0, snapshot_entries=snapshot_entries)
        self.every_n_steps = every_n_steps
        self.output_dir = output_dir
        self.snapshot_entries = snapshot_entries
        self._meter: MemoryMeter | None = None
        self._record = MemoryRecord()

    @property
    def peak_memory(self) -> int:
        """Highest peak of the run so far, in bytes."""
        return self._record.highest[1].height if self._record.highest else 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, MemoryProfiler) for callback in callbacks) > 1:
            raise UserError(
                "several MemoryProfilers would reset each other's peaks and replace each other's memory.json; remove all but one "
                "from trainer.callbacks"
            )
        self._trainer, self._module = trainer, pl_module
        self._stage = TrainerFn(stage).value
        # Asking for the run's folder is a collective call, in which all processes take part now, but not after an error.
        self._folder = Path(self.output_dir or run_folder(trainer))
        self._meter = meter_of(trainer.strategy.root_device)
        self._record, self._pending = MemoryRecord(), MemoryRecord()
        self._bottom, self._open = "load", "load"
        self._nested: list[tuple[str, bool]] = []
        self._next_of: dict[str, int] = {}
        self._failed_in: str | None = None
        self._sampled = False
        self._hooks: list[Any] = []
        gc.collect()  # what an earlier run left in cycles would be freed at any time, and be missing from a phase
        self._look()
        self._other = self._baseline = self._used(self._meter) - sum(self._kinds.count().values())
        if self.snapshot_entries and isinstance(self._meter, CudaMeter):
            self._meter.record_history(self.snapshot_entries)
        self._meter.reset()
        add_listener(self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_load()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first = self._next = self._step()
        if not pl_module.automatic_optimization:
            self._first = self._next = self._next + 1  # the number of the batch is still that of the previous one
            self._hooks = [
                optimizer.register_step_post_hook(self._after_step)
                for optimizer in trainer.optimizers
                if hasattr(optimizer, "register_step_post_hook")
            ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._bottom, self._failed_in = "forward", None
        step = self._step()
        if step >= self._next:
            self._sampled, self._sampled_step = True, step
            self._look()
            beyond = self._close()
            assert self._meter is not None
            self._other = min(self._other, beyond) if self._meter.keeps_freed else beyond

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        # The forward phase still has the gradients of the previous step, which are freed here.
        if self._bottom == "forward":
            self._enter("backward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._bottom == "forward":
            self._enter("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            self._enter("forward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._enter("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._bottom = BETWEEN
        if not self._sampled:
            return
        self._sampled = False
        self._close()
        if not pl_module.automatic_optimization or self._step() > self._sampled_step:
            n, done = self.every_n_steps, self._sampled_step
            self._next = done + 1 if done + 1 < self._first + _FIRST_STEPS else (done // n + 1) * n
            self._log()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In teardown the model has already left the device.
        self._look()
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def enter_phase(self, name: str) -> None:
        """Begin a named phase; called by :func:`~lit_lora.profiling.phases.phase`."""
        step = self._step()
        measured = self._sampled or self._bottom == "load" or step >= self._next_of.get(name, step)
        if measured:
            self._next_of[name] = step + self.every_n_steps
        self._begin(name, measured)

    def leave_phase(self, name: str, failed: bool) -> None:
        """End the innermost named phase."""
        if failed and self._failed_in is None:
            self._failed_in = name
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._meter is None:
            return
        failed_in = self._failed_in or (self._nested[-1][0] if self._nested else self._bottom)
        out_of_memory = is_out_of_memory(exception)
        try:
            self._look()
            if out_of_memory:
                explanation = self._explain(self._meter, failed_in, exception)
                self._close()
                self._write("out of memory", out_of_memory=explanation)
            elif self._bottom != "load":
                self._close()
                interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
                self._write("interrupted" if interrupted else "failed")
        except (OSError, UserError) as error:  # the original error must be raised
            rank_zero_warn(f"the memory profile could not be written: {error}")
        finally:
            self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._meter is not None:
            try:
                self._write("finished", ranks=gather(self.peak_memory))
            finally:
                self._stop()

    def _begin(self, name: str, measured: bool = True) -> None:
        if self._bottom == "load" and name in ("validation", "test", "predict"):
            self._end_load()
        self._failed_in = None
        if measured and not self._sampled:
            self._look()
        self._nested.append((name, measured))
        if measured:
            self._close()

    def _end(self) -> None:
        if not self._nested:
            return
        _, measured = self._nested.pop()
        if measured:
            if not self._sampled:
                self._look()
            self._close()
            if not self._sampled:
                self._log()

    def _enter(self, name: str) -> None:
        self._bottom = name
        if self._sampled:
            self._close()

    def _after_step(self, *_: Any) -> None:
        if self._bottom == "optimizer":
            self._enter("forward")

    def _end_load(self) -> None:
        if self._bottom == "load":
            self._bottom = BETWEEN
            self._look()
            self._other = self._close()

    def _step(self) -> int:
        """Number of the current step; with manual optimization, of the batch, since each optimizer steps at its own times."""
        if self._module.automatic_optimization:
            return self._trainer.global_step
        return self._trainer.fit_loop.total_batch_idx

    def _look(self) -> None:
        """Look up parameters and optimizers, which may have changed."""
        trainer = self._trainer
        self._kinds = MemoryKinds(self._module, trainer.optimizers, trainer.strategy.root_device)

    def _close(self) -> int:
        """Record the measured phase and begin to measure the next.

        Returns:
            Bytes in use now beyond weights, gradients and optimizer state.
        """
        assert self._meter is not None
        peak, now, counted = self._meter.peak(), self._meter.current(), self._kinds.count()
        kinds = divide(self._open, next(iter(peak.values())), counted, self._other)
        memory = PhaseMemory(peak, now, kinds, self._trainer.global_step)
        self._record.add(self._open, memory)
        self._pending.add(self._open, memory)
        self._meter.reset()
        self._open = self._label()
        return next(iter(now.values())) - sum(counted.values())

    def _label(self) -> str:
        """Name of the phase that is measured from now on."""
        for name, measured in reversed(self._nested):
            if measured:
                return name
        return self._bottom if self._sampled or self._bottom == "load" else BETWEEN

    def _used(self, meter: MemoryMeter) -> int:
        return next(iter(meter.current().values()))

    def _log(self) -> None:
        scalars, self._pending = self._pending.scalars(), MemoryRecord()
        for logger in self._trainer.loggers:
            logger.log_metrics(scalars, step=self._trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _explain(self, meter: MemoryMeter, phase: str, exception: BaseException) -> dict[str, Any]:
        """Phase, message, memory by kind and advice of an out-of-memory error."""
        current, counted = meter.current(), self._kinds.count()
        kinds = divide(phase, next(iter(meter.peak().values())), counted, self._other)
        advice = self._own_advice(kinds)
        if advice is None:
            unused = current.get("reserved", 0) - current.get("allocated", 0)
            advice = general_advice(kinds, self._kinds.full_precision(), unused, str(self._trainer.precision))
        return {"phase": phase, "message": str(exception), "kinds": kinds, "advice": advice}

    def _own_advice(self, kinds: Mapping[str, int]) -> list[tuple[str, int]] | None:
        """Changes from the module's own ``memory_advice`` or from the planner; None if neither has any."""
        try:
            if hasattr(self._module, "memory_advice"):
                return sorted_advice(cast(Any, self._module).memory_advice(kinds))
            return planned_advice(self._module, self._trainer)
        except Exception:  # the original error must be raised, whatever fails here
            _LOG.info("there is no advice for %s", type(self._module).__name__, exc_info=True)
            return None

    def _write(self, status: str, ranks: list[int] | None = None, out_of_memory: dict[str, Any] | None = None) -> None:
        """Write the files and print the table, on the first process and on processes that ran out of memory."""
        assert self._meter is not None
        trainer = self._trainer
        if not trainer.is_global_zero and out_of_memory is None:
            return
        name = "memory" if self._stage == "fit" else f"memory-{self._stage}"
        if not trainer.is_global_zero:
            name += f"-rank{trainer.global_rank}"
        report = profile_report(
            self._record,
            self._meter,
            status=status,
            stage=self._stage,
            baseline=self._baseline,
            options={"every_n_steps": self.every_n_steps, "snapshot_entries": self.snapshot_entries},
            ranks=ranks,
            out_of_memory=out_of_memory,
        )
        with atomic_file(self._folder / f"{name}.json") as part:
            part.write_text(json.dumps(report, indent=1) + "\n")
        files = [] if out_of_memory is None else self._meter.diagnose(self._folder, name)
        title = profile_title(self._meter)
        chart = memory_chart({phase: memory.kinds for phase, memory in self._record.phases.items()}, title)
        with atomic_file(self._folder / f"{name}.png") as part:
            chart.save(part, format="PNG")
        for logger in trainer.loggers:
            log_image(logger, "memory", chart, trainer.fit_loop.epoch_loop._batches_that_stepped)
        files = [self._folder / f"{name}.json", self._folder / f"{name}.png", *files]
        print(profile_text(report, self._record.table(), title, files), flush=True)

    def _stop(self) -> None:
        remove_listener(self)
        for hook in self._hooks:
            hook.remove()
        if self.snapshot_entries and isinstance(self._meter, CudaMeter):
            self._meter.record_history(0)
        self._meter = None
        del self._kinds, self._trainer, self._module  # the callback may live longer than the model
