from __future__ import annotations

import copy
import json
import pickle
import sys
import time
import types

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, Dataset

import lit_lora.callbacks.run_report as run_report
from lit_lora.callbacks.memory_profiler import MemoryProfiler
from lit_lora.callbacks.run_report import RunReport
from lit_lora.errors import UserError


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Linear(1, 7).requires_grad_(False)
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        values = batch["x"] if isinstance(batch, dict) else batch
        return self.layer(values).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(count: int = 8, batch_size: int = 2) -> DataLoader:
    return DataLoader(torch.ones(count, 1), batch_size=batch_size)


@pytest.fixture
def fit(trainer_options, tmp_path):
    def fit(module=None, loader=None, report=None, callbacks=(), ckpt_path=None, **options):
        report = report or RunReport()
        options = trainer_options | {"callbacks": [report, *callbacks], "max_steps": 4} | options
        try:
            Trainer(**options).fit(module or Tiny(), loader or data(), ckpt_path=ckpt_path)
        finally:
            path = tmp_path / "report.json"
            fit.report = json.loads(path.read_text()) if path.exists() else None
        return fit.report

    return fit


def test_counted_figures(fit, capsys):
    start, cpu = time.monotonic(), time.process_time()
    report = fit()
    taken = report["this_run"]
    assert report["status"] == "finished"
    assert taken == report["total"]
    assert (taken["samples"], taken["optimizer_steps"], report["runs"]) == (8, 4, 1)
    assert 0 < taken["train_seconds"] < taken["wall_seconds"] <= time.monotonic() - start
    assert 0 < taken["cpu_seconds"] <= time.process_time() - cpu + 0.1
    assert taken["samples_per_second"] == pytest.approx(8 / taken["train_seconds"])
    assert report["adapter_parameters"] == 2
    assert report["adapter_ranks"] == {}
    assert report["peak_memory"] > 2**20
    assert taken["gpu_energy_kwh"] is None
    assert report["gpu_energy_note"] == "the run is not on an NVIDIA GPU"
    assert (taken["time_cost"], taken["energy_cost"]) == (None, None)
    out = capsys.readouterr().out
    assert "Run report (finished)" in out
    assert "no GPU energy" not in out
    fit(report=RunReport(price_per_kwh=0.3))
    assert "no GPU energy: the run is not on an NVIDIA GPU" in capsys.readouterr().out


def test_durations_have_one_form(fit):
    report = fit()
    report["this_run"]["wall_seconds"], report["total"]["wall_seconds"] = 48.71, 65.2
    row = next(line for line in run_report._table(report).splitlines() if line.startswith("wall time"))
    assert row.split() == ["wall", "time", "49", "s", "1", "min", "5", "s"]


def test_it_can_be_copied_after_a_run(fit):
    report = RunReport()
    fit(report=report)
    assert pickle.loads(pickle.dumps(report)).state_dict() == copy.deepcopy(report).state_dict() == {}


def test_samples_of_weight_zero_are_not_trained(fit):
    batches = [{"x": torch.ones(3, 1), "weight": torch.tensor([1.0, 0.5, weight])} for weight in (0.0, 2.0)]
    assert fit(loader=DataLoader(batches, batch_size=None), max_steps=2)["this_run"]["samples"] == 5


def test_accumulated_batches(fit):
    taken = fit(accumulate_grad_batches=2, max_steps=2)["this_run"]
    assert (taken["samples"], taken["optimizer_steps"]) == (8, 2)


class Numberless(Tiny):
    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(1, 1)).mean()


def test_batches_whose_size_cannot_be_found(fit, capsys):
    taken = fit(Numberless(), DataLoader([["a"], ["b"]], batch_size=None), max_steps=2)["this_run"]
    assert (taken["samples"], taken["samples_per_second"]) == (None, None)


class Busy(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        end = time.process_time() + 0.15
        while time.process_time() < end:
            pass
        return torch.ones(1)


@pytest.mark.slow
def test_time_of_loader_processes_is_counted(fit):
    before = time.process_time()
    taken = fit(loader=DataLoader(Busy(), batch_size=1, num_workers=1))["this_run"]
    assert taken["cpu_seconds"] >= time.process_time() - before + 0.4


def test_cost(fit):
    taken = fit(report=RunReport(price_per_hour=36, price_per_kwh=1))["this_run"]
    assert taken["time_cost"] == pytest.approx(taken["wall_seconds"] / 100)
    assert taken["energy_cost"] is None  # there is a price, but no counter
    for name in ("price_per_hour", "price_per_kwh"):
        with pytest.raises(UserError, match=f"{name}=-1 is too small; it must be at least 0"):
            RunReport(**{name: -1})


def test_resumed_runs_report_the_total_too(fit, tmp_path):
    def options():
        save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        return {"enable_checkpointing": True, "callbacks": [save]}

    first = fit(**options())
    assert first["total"]["optimizer_steps"] == 4
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]["RunReport"]
    assert (saved["samples"], saved["optimizer_steps"]) == (4, 2)
    report = fit(ckpt_path=tmp_path / "step=2.ckpt", loader=data(16), max_steps=6, **options())
    assert (report["this_run"]["samples"], report["total"]["samples"]) == (8, 12)
    assert (report["this_run"]["optimizer_steps"], report["total"]["optimizer_steps"]) == (4, 6)
    assert report["total"]["wall_seconds"] == pytest.approx(report["this_run"]["wall_seconds"] + saved["wall_seconds"])
    assert report["total"]["cpu_seconds"] == pytest.approx(report["this_run"]["cpu_seconds"] + saved["cpu_seconds"])
    assert report["runs"] == 2
    nothing_left = fit(ckpt_path=tmp_path / "step=6.ckpt", loader=data(16), max_steps=6, **options())
    assert (nothing_left["this_run"]["optimizer_steps"], nothing_left["total"]["optimizer_steps"]) == (0, 6)


class Stop(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(KeyboardInterrupt(), SystemExit, "interrupted"), (ZeroDivisionError(), ZeroDivisionError, "failed")],
)
def test_runs_that_do_not_finish(fit, error, raised, status):
    with pytest.raises(raised):
        fit(callbacks=[Stop(error)])
    assert fit.report["status"] == status
    assert fit.report["this_run"]["samples"] == 4


class Second(SingleDeviceStrategy):
    """As if this were the second process of a run."""

    is_global_zero = False


def test_only_the_first_process_prints_after_an_error(fit, tmp_path, capsys):
    with pytest.raises(ZeroDivisionError):
        fit(callbacks=[Stop(ZeroDivisionError())], strategy=Second())
    (written,) = tmp_path.glob("report-rank*.json")
    assert json.loads(written.read_text())["status"] == "failed"
    assert "report" not in capsys.readouterr().out


def test_a_report_that_cannot_be_written_hides_no_error(fit, tmp_path):
    (tmp_path / "file").write_text("")
    report = RunReport(output_dir=str(tmp_path / "file" / "folder"))
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="could not be written"):
        fit(callbacks=[Stop(ZeroDivisionError())], report=report)


def test_an_error_before_training_leaves_no_report(fit):
    class Module(Tiny):
        def configure_model(self):
            raise UserError("no such model")

    with pytest.raises(UserError):
        fit(Module())
    assert fit.report is None


def test_other_stages_are_not_reported(trainer_options, tmp_path):
    class Module(Tiny):
        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    Trainer(**trainer_options, callbacks=[RunReport()]).validate(Module(), data(), verbose=False)
    assert not (tmp_path / "report.json").exists()


def test_a_second_run_starts_from_zero(fit):
    report = RunReport()
    fit(report=report)
    assert fit(report=report, max_steps=2)["this_run"]["samples"] == 4


@pytest.mark.parametrize("first", [True, False])
def test_the_peak_with_a_profiler_that_resets_it(fit, first):
    class Module(Tiny):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                torch.ones(100 * 2**20 // 4).sum()
            return super().training_step(batch, batch_idx)

    report, profiler = RunReport(), MemoryProfiler()
    # Lightning calls them in the order in which they are given.
    options = {"report": report, "callbacks": [profiler]} if first else {"report": profiler, "callbacks": [report]}
    assert fit(Module(), **options)["peak_memory"] == profiler.peak_memory


class FakeDriver(types.ModuleType):
    """A driver with GPUs by their UUID; each reading of a counter adds 1.8 MJ, half a kWh."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.millijoules = {"GPU-a": 7_000_000, "GPU-b": 0}

    def nvmlInit(self):  # noqa: N802
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid not in self.millijoules:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        self.millijoules[handle] += 1_800_000_000
        return self.millijoules[handle]


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(run_report, "_uuid", lambda device: "GPU-a")
    return driver


def test_energy(fit, driver):
    report = fit(report=RunReport(price_per_kwh=0.3))
    assert report["this_run"]["gpu_energy_kwh"] == pytest.approx(0.5)
    assert report["this_run"]["energy_cost"] == pytest.approx(0.15)
    assert report["gpu_energy_note"] is None
    assert driver.open == 0


def test_a_gpu_without_a_counter(fit, driver):
    del driver.millijoules["GPU-a"]
    report = fit()
    assert report["this_run"]["gpu_energy_kwh"] is None
    assert report["gpu_energy_note"] == "the GPU has no energy counter: Not Found"
    assert driver.open == 0


def test_no_library_for_the_driver(fit, driver, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert fit()["gpu_energy_note"] == 'pynvml is not installed: pip install "lit_lora[energy]"'


def test_processes_that_share_a_gpu_count_it_once():
    def own(device, joules, samples=1):
        times = {"wall_seconds": 2.0, "train_seconds": 1.0, "cpu_seconds": 3.0, "optimizer_steps": 5}
        return times | {"device": device, "joules": joules, "samples": samples}

    shared = [own(("a", "GPU-1"), 3.6e6), own(("a", "GPU-1"), 3.5e6), own(("b", "GPU-1"), 3.6e6)]
    figures = run_report._together(shared)
    assert figures["gpu_energy_kwh"] == pytest.approx(2.0)
    assert (figures["samples"], figures["cpu_seconds"], figures["wall_seconds"]) == (3, 9.0, 2.0)
    assert figures["optimizer_steps"] == 5
    assert run_report._together([*shared, own(("c", "GPU-2"), None)])["gpu_energy_kwh"] is None
