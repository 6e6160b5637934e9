"""Report of a run's time, energy, samples and cost."""

from __future__ import annotations

import json
import platform
import resource
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from tqdm import tqdm

from lit_lora.adapters.ranked_layer import layer_ranks
from lit_lora.argument_types import check_types
from lit_lora.batch_size import batch_size
from lit_lora.byte_sizes import format_bytes
from lit_lora.distributed.collectives import gather
from lit_lora.early_stopping import stopped_early
from lit_lora.errors import UserError, check_least
from lit_lora.files import atomic_file
from lit_lora.profiling.meter import meter_of
from lit_lora.report_text import format_duration, format_reason
from lit_lora.run_folder import run_folder

_JOULES_PER_KWH = 3.6e6

_NO_GPU = "the run is not on an NVIDIA GPU"

Figures = dict[str, Any]


class RunReport(Callback):
    """Measures time, energy, samples and cost of training any LightningModule; prints a table and writes ``report.json``.

    Interrupted and failed runs are reported too. A resumed run reports its own figures and the total of all runs, since
    checkpoints hold the figures up to them.

    ``report.json`` has ``schema`` (1), ``status`` (finished, interrupted, failed), ``stopped_early`` (what ``EarlyStopping``
    found that ended the run, or null), ``world_size``, ``processes`` (the number of processes in the figures: after an error
    each process writes only its own, to ``report-rank1.json`` and so on for all but the first, which alone prints a table),
    ``this_run``, ``total`` and ``runs`` (number of runs in ``total``), ``peak_memory`` (bytes of the process with the highest
    peak in this run), ``peak_memory_of`` (``allocated`` or ``resident``, see :class:`MemoryProfiler`), ``adapter_parameters``
    (number of trained parameters), ``adapter_ranks`` (rank of each LoRA layer by its name; empty for other adapters),
    ``gpu_energy_note`` and ``prices``. ``this_run`` and ``total`` have

    - ``wall_seconds`` from setup to the end, and ``train_seconds``, the part of them after the model was loaded;
    - ``cpu_seconds`` of all threads, and of child processes that have ended;
    - ``gpu_energy_kwh`` from the driver's counter of each GPU, which includes other users of the GPU; null without a counter,
      for the reason in ``gpu_energy_note``;
    - ``samples`` trained: samples with a positive ``weight`` if the batch has weights, otherwise all samples of the batch; null
      if the size of a batch is unknown; ``samples_per_second`` of training;
    - ``optimizer_steps``;
    - ``time_cost`` and ``energy_cost``, null without a price.

    Args:
        price_per_hour: Price per hour of all machines of the run together, in any currency. Defaults to None: no cost of time.
        price_per_kwh: Price per kWh of electricity, in the same currency. Defaults to None: no cost of energy.
        output_dir: Folder for the file. Defaults to the run's folder, in which ``checkpoints`` is too.

    Raises:
        UserError: If a price is negative.
    """

    def __init__(
        self, price_per_hour: float | None = None, price_per_kwh: float | None = None, output_dir: str | None = None
    ) -> None:
        check_types(RunReport, locals())
        check_least(0, price_per_hour=price_per_hour, price_per_kwh=price_per_kwh)
        self.price_per_hour = price_per_hour
        self.price_per_kwh = price_per_kwh
        self.output_dir = output_dir
        self.lists_files = True
        """Whether it prints where the file is; ``lit-lora train`` prints that itself."""
        self._trainer: Trainer | None = None
        self._before: Figures = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._before = {}
        # Asking for the run's folder is a collective call, in which all processes take part now, but not after an error.
        self._folder = Path(self.output_dir or run_folder(trainer))
        self._start, self._cpu_start = time.monotonic(), _cpu_seconds()
        self._energy = _GpuEnergy(_uuid(trainer.strategy.root_device))
        self._meter = meter_of(trainer.strategy.root_device)
        self._meter.reset()
        self._loaded: float | None = None
        self._first_step: int | None = None  # none if a resumed run has nothing left to train
        self._samples: int | None = 0
        # Weighted samples are counted on the device, since reading the number at each step would synchronise.
        self._weighted: Tensor | None = None
        self._trainer = trainer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loaded = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        weight = batch.get("weight") if isinstance(batch, Mapping) else None
        if isinstance(weight, Tensor):
            trained = (weight > 0).sum()
            self._weighted = trained if self._weighted is None else self._weighted + trained
        elif self._samples is not None:
            size = batch_size(batch)
            self._samples = None if size is None else self._samples + size

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._trainer is None:
            return
        try:
            if self._loaded is not None:
                interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
                own = self._own()
                self._write("interrupted" if interrupted else "failed", pl_module, [own])
        except (OSError, UserError) as error:  # the original error must be raised
            rank_zero_warn(f"the run's report could not be written: {error}")
        finally:
            self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._trainer is None:
            return
        try:
            everyone = gather(self._own())
            if trainer.is_global_zero:
                self._write("finished", pl_module, everyone)
        finally:
            self._stop()

    def _stop(self) -> None:
        self._trainer = None
        del self._meter  # nothing that measures can be pickled

    def state_dict(self) -> dict[str, Any]:
        """Totals over all processes and runs so far; a collective call during training."""
        return {} if self._trainer is None else _sum(self._before, _together(gather(self._own())))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict

    def _own(self) -> Figures:
        """Figures of this process so far."""
        assert self._trainer is not None
        now = time.monotonic()
        samples = self._samples
        if samples is not None and self._weighted is not None:
            samples += int(self._weighted)
        peak = next(iter(self._meter.peak().values()))
        # A profiler resets the peak, so the highest peak that it has recorded counts too.
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        peaks = [getattr(callback, "peak_memory", 0) for callback in callbacks]
        return {
            "device": (platform.node(), self._energy.uuid),
            "joules": self._energy.joules(),
            "note": self._energy.note,
            "peak_memory": max(peak, *peaks),
            "wall_seconds": now - self._start,
            "train_seconds": 0.0 if self._loaded is None else now - self._loaded,
            "cpu_seconds": _cpu_seconds() - self._cpu_start,
            "samples": samples,
            "optimizer_steps": 0 if self._first_step is None else self._trainer.global_step - self._first_step,
        }

    def _write(self, status: str, pl_module: LightningModule, everyone: list[Figures]) -> None:
        assert self._trainer is not None
        trainer = self._trainer
        this_run = _together(everyone)
        total = _sum(self._before, this_run)
        report = {
            "schema": 1,
            "status": status,
            "stopped_early": stopped_early(trainer),
            "world_size": trainer.world_size,
            "processes": len(everyone),
            "this_run": self._finished(this_run),
            "total": self._finished(total),
            "runs": total["runs"],
            "peak_memory": max(own["peak_memory"] for own in everyone),
            "peak_memory_of": next(iter(self._meter.current())),
            "adapter_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "adapter_ranks": layer_ranks(pl_module),
            "gpu_energy_note": next((own["note"] for own in everyone if own["note"]), None),
            "prices": {"per_hour": self.price_per_hour, "per_kwh": self.price_per_kwh},
        }
        name = "report.json" if trainer.is_global_zero else f"report-rank{trainer.global_rank}.json"
        with atomic_file(self._folder / name) as part:
            part.write_text(json.dumps(report, indent=1) + "\n")
        if not trainer.is_global_zero:
            return  # its table beside the first process's would only hide that one
        lines = [_table(report)]
        if self.lists_files:
            lines.append(f"written: {self._folder / name}")
            if self.output_dir is None:
                lines.append(f"as a page: lit-lora report {shlex.quote(str(self._folder))}")
        with tqdm.external_write_mode():  # a bar that an exception ends is still there
            print("\n".join(lines), flush=True)

    def _finished(self, figures: Figures) -> Figures:
        """The figures with rates and costs derived from them."""
        samples, seconds, energy = figures["samples"], figures["train_seconds"], figures["gpu_energy_kwh"]
        rate = None if samples is None or not seconds else samples / seconds
        return {
            **{name: value for name, value in figures.items() if name != "runs"},
            "samples_per_second": rate,
            "time_cost": _product(self.price_per_hour, figures["wall_seconds"] / 3600),
            "energy_cost": _product(self.price_per_kwh, energy),
        }


class _GpuEnergy:
    """The driver's energy counter of one GPU.

    Args:
        uuid: UUID of the GPU in the driver's notation; None if the run does not use an NVIDIA GPU.
    """

    def __init__(self, uuid: str | None) -> None:
        self.uuid = uuid
        self.note: str | None = None
        self._start = self._read()

    def joules(self) -> float | None:
        """Energy since the start in joules; None without a counter, for the reason in :attr:`note`."""
        now = self._read()
        return None if now is None or self._start is None else (now - self._start) / 1000

    def _read(self) -> int | None:
        """Energy in millijoules since the driver was loaded; None without a counter."""
        if self.uuid is None:
            self.note = _NO_GPU
            return None
        try:
            import pynvml
        except ImportError:
            self.note = 'pynvml is not installed: pip install "lit_lora[energy]"'
            return None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.note = f"the driver does not answer: {error}"
            return None
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except pynvml.NVMLError as error:
            self.note = f"the GPU has no energy counter: {error}"
            return None
        finally:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def _uuid(device: torch.device) -> str | None:
    """UUID of a CUDA device. Its index would not do, since a program may see only some of the driver's devices."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _together(everyone: list[Figures]) -> Figures:
    """Figures of all processes combined; a GPU that several processes share counts once."""
    joules: dict[Any, float | None] = {}
    for own in everyone:
        joules[own["device"]] = _largest(joules.get(own["device"], 0.0), own["joules"])
    energy = _total(joules.values())
    return {
        "wall_seconds": max(own["wall_seconds"] for own in everyone),
        "train_seconds": max(own["train_seconds"] for own in everyone),
        "cpu_seconds": sum(own["cpu_seconds"] for own in everyone),
        "gpu_energy_kwh": None if energy is None else energy / _JOULES_PER_KWH,
        "samples": _total(own["samples"] for own in everyone),
        "optimizer_steps": everyone[0]["optimizer_steps"],
        "runs": 1,
    }


def _sum(before: Figures, this_run: Figures) -> Figures:
    """Sum over two runs; a figure is unknown if it is unknown for either."""
    return {name: _total([before[name], value]) for name, value in this_run.items()} if before else this_run


def _total(values: Any) -> Any:
    values = list(values)
    return None if None in values else sum(values)


def _largest(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else max(a, b)


def _product(price: float | None, amount: float | None) -> float | None:
    return None if price is None or amount is None else price * amount


def _table(report: Mapping[str, Any]) -> str:
    rows = [("", "this run", "total")]
    for label, name, show in (
        ("wall time", "wall_seconds", format_duration),
        ("training", "train_seconds", format_duration),
        ("CPU time", "cpu_seconds", format_duration),
        ("GPU energy, kWh", "gpu_energy_kwh", _number),
        ("samples", "samples", _number),
        ("optimizer steps", "optimizer_steps", _number),
        ("samples per second", "samples_per_second", _number),
        ("cost of time", "time_cost", _number),
        ("cost of energy", "energy_cost", _number),
    ):
        values = [report[column][name] for column in ("this_run", "total")]
        if values != [None, None]:
            rows.append((label, show(values[0]), show(values[1])))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    of = "" if report["processes"] == report["world_size"] else f", one process of {report['world_size']}"
    lines = [f"\nRun report ({report['status']}{of})"]
    lines += [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    if report["stopped_early"]:
        lines.append(format_reason(f"ended by early stopping: {report['stopped_early']}"))
    if report["gpu_energy_note"] and (report["gpu_energy_note"] != _NO_GPU or report["prices"]["per_kwh"] is not None):
        lines.append(f"no GPU energy: {report['gpu_energy_note']}")
    lines.append(f"peak memory {format_bytes(report['peak_memory'])} ({report['peak_memory_of']})")
    lines.append(f"trained parameters {report['adapter_parameters']:,}")
    if ranks := report["adapter_ranks"].values():
        span = f"{min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.4g} on average"
        lines.append(f"ranks of {len(ranks)} layers {span if min(ranks) < max(ranks) else max(ranks)}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
