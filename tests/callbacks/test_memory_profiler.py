from __future__ import annotations

import gc
import json
import subprocess
import sys
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import LoraConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lit_lora.callbacks import SampleImages
from lit_lora.callbacks.memory_profiler import MemoryProfiler
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from lit_lora.profiling.advice import general_advice
from lit_lora.profiling.chart import memory_chart
from lit_lora.profiling.kinds import KINDS, MemoryKinds
from lit_lora.profiling.meter import ProcessMeter
from lit_lora.profiling.phases import phase
from lit_lora.profiling.record import MemoryRecord, PhaseMemory
from tests.helpers import loader_of, make_batches, processes

MIB = 2**20
CPU = torch.device("cpu")


class Heavy(LightningModule):
    """Loads 24 MiB of frozen weights, trains 8 MiB, and holds 96 MiB of activations from forward to backward."""

    frozen, trained, activations = 24 * MIB, 8 * MIB, 96 * MIB

    def __init__(self) -> None:
        super().__init__()
        self.trained_weight: nn.Parameter | None = None

    def configure_model(self) -> None:
        if self.trained_weight is None:
            self.frozen_weight = nn.Parameter(torch.ones(self.frozen // 4), requires_grad=False)
            self.trained_weight = nn.Parameter(torch.ones(self.trained // 4))

    def compute(self, batch: torch.Tensor) -> torch.Tensor:
        assert self.trained_weight is not None
        # Mapped memory goes back to the system when it is freed. Of the C library's that is not certain: if it has a free block
        # of that size from earlier tests, it takes the memory from there, keeps it, and may take other memory the next time.
        held = torch.frombuffer(mmap(-1, self.activations), dtype=torch.float32).fill_(1).requires_grad_()
        return Hold.apply(held, self.trained_weight.sum()) * batch.mean()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.compute(batch)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        with phase("drawing"):
            torch.ones(48 * MIB // 4).sum()

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.compute(batch)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3, foreach=False)


class Hold(torch.autograd.Function):
    """Adds nothing and keeps its first argument until the backward pass."""

    @staticmethod
    def forward(ctx: Any, held: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(held)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        assert ctx.saved_tensors
        return None, grad


def data(count: int = 4) -> DataLoader[Any]:
    return DataLoader(torch.ones(count, 1), batch_size=1)  # type: ignore[arg-type]


@pytest.fixture
def fit(trainer_options, tmp_path):
    """Train with the profiler and read its report."""

    def fit(module=None, validation=None, profiler=None, callbacks=(), **options):
        profiler = profiler or MemoryProfiler()
        options = trainer_options | {"max_steps": 4, "callbacks": [profiler, *callbacks]} | options
        trainer = Trainer(**options)
        try:
            trainer.fit(module or Heavy(), data(), validation)
        finally:
            path = Path(trainer.log_dir or trainer.default_root_dir) / "memory.json"
            fit.report = json.loads(path.read_text()) if path.exists() else None
        return fit.report

    return fit


def near(size: int) -> Any:
    """Resident memory counts all pages of the process: code is loaded at first use, and freed blocks are kept for a while."""
    return pytest.approx(size, abs=24 * MIB)


@pytest.fixture
def nothing_freed_before():
    """Returns to the system what earlier tests have freed, which new tensors would take without the process growing."""
    gc.collect()
    ProcessMeter(CPU).reset()


@pytest.mark.usefixtures("nothing_freed_before")
def test_phases_and_kinds(fit):
    report = fit(validation=data(1), num_sanity_val_steps=0)
    phases = report["phases"]
    assert list(phases) == ["load", "forward", "backward", "optimizer", "validation", "drawing", "between"]
    for name in ("forward", "backward", "optimizer"):
        kinds = phases[name]["kinds"]
        assert kinds["frozen weights"] == Heavy.frozen
        assert kinds["adapter"] == Heavy.trained
        assert sum(kinds.values()) == phases[name]["peak"]["resident"]
    assert phases["backward"]["kinds"]["gradients"] == Heavy.trained
    # Adam keeps two averages and a count.
    assert phases["optimizer"]["kinds"]["optimizer state"] == 2 * Heavy.trained + 4
    assert phases["forward"]["kinds"]["activations"] == near(Heavy.activations)
    assert phases["backward"]["kinds"]["activations"] == near(Heavy.activations)
    assert phases["optimizer"]["kinds"]["activations"] == 0
    assert phases["drawing"]["kinds"]["activations"] == near(48 * MIB)
    assert phases["validation"]["kinds"]["activations"] == near(0)
    assert phases["load"]["peak"]["resident"] - report["baseline"] >= Heavy.frozen + Heavy.trained - 4 * MIB
    highest = max(phases.values(), key=lambda memory: memory["peak"]["resident"])
    assert report["peak"]["bytes"] == highest["peak"]["resident"]
    assert report["status"] == "finished"
    assert report["ranks"] == [report["peak"]["bytes"]]


def test_gradients_of_the_last_step_count_in_forward(fit):
    kinds = fit()["phases"]["forward"]["kinds"]
    assert kinds["gradients"] == Heavy.trained


def test_what_an_earlier_run_left_does_not_count(fit):
    class Collecting(Heavy):
        def on_before_backward(self, loss):
            gc.collect()

    gc.disable()  # else it may be freed before the run
    try:
        earlier: dict[str, Any] = {"weights": torch.ones(48 * MIB // 4)}
        earlier["itself"] = earlier
        del earlier
        kinds = fit(Collecting())["phases"]["forward"]["kinds"]
    finally:
        gc.enable()
    assert kinds["gradients"] == Heavy.trained  # the peak is in the second step, not in the first
    assert kinds["activations"] == near(Heavy.activations)


def test_the_first_steps_and_every_nth_are_measured(fit):
    class Steps(Callback):
        seen: list[int] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append(profiler._record.phases["optimizer"].count)

    profiler, steps = MemoryProfiler(every_n_steps=5), Steps()
    fit(profiler=profiler, callbacks=[steps], max_steps=12)
    assert steps.seen == [1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4]


def test_steps_that_are_not_measured_are_watched_as_a_whole(fit):
    class Once(Heavy):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                torch.ones(200 * MIB // 4).sum()
            return super().training_step(batch, batch_idx)

    report = fit(Once())
    assert report["phases"]["between"]["kinds"]["activations"] >= 190 * MIB
    assert report["peak"]["phase"] == "between"


def test_accumulated_gradients(fit):
    report = fit(max_steps=2, accumulate_grad_batches=2)
    counts = {name: memory["count"] for name, memory in report["phases"].items()}
    assert (counts["forward"], counts["backward"], counts["optimizer"]) == (4, 4, 2)


class Manual(Heavy):
    """Two optimizers, each with a forward and backward pass of its own in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = self.compute(batch)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            del loss  # it holds the activations

    def configure_optimizers(self):
        return [super().configure_optimizers(), torch.optim.SGD([self.trained_weight], lr=0.1)]


def test_manual_optimization(fit):
    phases = fit(Manual(), profiler=MemoryProfiler(every_n_steps=2), max_steps=8)["phases"]
    # Batches 0, 1 and 2. Each has two backward passes, two steps, and forward before, between and after these.
    assert [phases[name]["count"] for name in ("backward", "optimizer")] == [6, 6]
    assert phases["forward"]["kinds"]["activations"] == near(Heavy.activations)
    assert phases["optimizer"]["kinds"]["activations"] == 0


def test_loggers(fit, tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="tb", version=0), CSVLogger(tmp_path, name="csv", version=0)]
    fit(logger=loggers, profiler=MemoryProfiler(every_n_steps=2))
    events = EventAccumulator(str(tmp_path / "tb" / "version_0"), {"images": 0, "scalars": 0}).Reload()
    tags = {f"memory_mib/peak/{name}" for name in ("load", "forward", "backward", "optimizer", "between")}
    tags |= {f"memory_mib/kind/{kind.replace(' ', '_')}" for kind in KINDS}
    assert set(events.Tags()["scalars"]) - {"epoch"} == tags
    adapter = events.Scalars("memory_mib/kind/adapter")
    assert [event.step for event in adapter] == [0, 1, 2]
    assert {event.value for event in adapter} == {Heavy.trained / MIB}
    assert len(events.Images("memory")) == 1
    assert "memory_mib/peak/forward" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    with Image.open(tmp_path / "tb" / "version_0" / "memory.png") as chart:
        assert chart.format == "PNG"


def test_the_table(fit, capsys):
    report = fit(validation=data(1))
    lines = capsys.readouterr().out.splitlines()
    assert "MiB" in lines[1]
    rows = {line.split()[0]: line.split() for line in lines[3:] if line}
    assert rows["forward"][3:5] == ["24.0", "8.0"]
    assert float(rows["load"][1].replace(",", "")) == pytest.approx(
        report["phases"]["load"]["peak"]["resident"] / MIB,
        abs=0.6,  # from a thousand on without decimals
    )


def test_a_run_after_another_is_measured_anew(fit):
    profiler = MemoryProfiler()
    fit(profiler=profiler)
    report = fit(profiler=profiler, max_steps=1)
    assert report["phases"]["optimizer"]["count"] == 1


def test_several_profilers_are_refused(fit):
    with pytest.raises(UserError, match="several MemoryProfilers would reset each other's peaks"):
        fit(callbacks=[MemoryProfiler()])


def test_other_stages_have_reports_of_their_own(trainer_options, tmp_path):
    trainer = Trainer(**trainer_options, callbacks=[MemoryProfiler()])
    module = Heavy()
    trainer.validate(module, data(1), verbose=False)
    trainer.test(module, data(1), verbose=False)
    trainer.predict(module, data(1))
    assert not (tmp_path / "memory.json").exists()
    phases = {
        stage: json.loads((tmp_path / f"memory-{stage}.json").read_text())["phases"]
        for stage in ("validate", "test", "predict")
    }
    assert list(phases["validate"]) == ["load", "validation", "drawing", "between"]
    assert "test" in phases["test"]
    assert phases["predict"]["predict"]["kinds"]["activations"] == near(Heavy.activations)


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"logger": True}, {"max_steps": 0}])
def test_unusual_runs(fit, options):
    assert fit(**options)["status"] == "finished"


def test_sampling_is_a_phase_of_its_own(trainer_options, tmp_path):
    module = LoraDiffusion(StableDiffusion("embedded"), LoraConfig(r=2), base_dtype="float32")
    callbacks = [MemoryProfiler(), SampleImages(["a star"], every_n_steps=2, num_inference_steps=1)]
    Trainer(**trainer_options, max_steps=2, callbacks=callbacks).fit(module, loader_of(make_batches(2, size=32)))
    report = json.loads((tmp_path / "memory.json").read_text())
    assert report["phases"]["sampling"]["count"] == 1  # two, of which the second is too soon after the first
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in module.parameters()) - trained
    kinds = report["phases"]["backward"]["kinds"]
    assert (kinds["adapter"], kinds["gradients"]) == (trained, trained)
    assert kinds["frozen weights"] == pytest.approx(frozen, rel=0.01)  # and buffers


class Greedy(Heavy):
    """Allocates more memory than there is."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            torch.empty(2**58)
        return super().training_step(batch, batch_idx)


def test_out_of_memory(fit, capsys):
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        fit(Greedy())
    report = fit.report
    assert report["status"] == "out of memory"
    error = report["out_of_memory"]
    assert error["phase"] == "forward"
    assert "tried to allocate" in error["message"]
    assert error["kinds"]["optimizer state"] == 2 * Heavy.trained + 4
    saved = [size for _, size in error["advice"]]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > 0
    assert "8 bits" in str(error["advice"])
    out = capsys.readouterr().out
    assert "Out of memory in forward" in out
    assert out.index(error["advice"][0][0]) < out.index(error["advice"][1][0])


def test_out_of_memory_in_a_named_phase_of_an_unmeasured_step(fit):
    class Module(Heavy):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                with phase("encoding"):
                    raise MemoryError("too much")
            return super().training_step(batch, batch_idx)

        def memory_advice(self, kinds):
            return [("small", 1), ("nothing", 0), ("frozen", kinds["frozen weights"])]

    with pytest.raises(MemoryError):
        fit(Module())
    error = fit.report["out_of_memory"]
    assert error["phase"] == "encoding"
    assert error["advice"] == [["frozen", Heavy.frozen], ["small", 1]]
    with phase("encoding"):
        pass  # nobody listens any more


@pytest.mark.parametrize(
    ("error", "status"), [(ZeroDivisionError, "failed"), (torch.OutOfMemoryError, "out of memory")]
)
def test_other_errors(fit, error, status):
    class Module(Heavy):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                raise error("…")

    with pytest.raises(error):
        fit(Module())
    assert fit.report["status"] == status


def test_an_error_while_loading_leaves_no_report(fit):
    class Module(Heavy):
        def configure_model(self):
            raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        fit(Module())
    assert fit.report is None


def test_a_report_that_cannot_be_written_hides_no_error(fit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="can't allocate"), pytest.warns(UserWarning, match="could not be written"):
        fit(Greedy(), profiler=MemoryProfiler(output_dir=str(tmp_path / "file" / "folder")))


def test_bad_values():
    with pytest.raises(UserError, match="every_n_steps=0 is too small"):
        MemoryProfiler(every_n_steps=0)
    with pytest.raises(UserError, match="snapshot_entries=-1"):
        MemoryProfiler(snapshot_entries=-1)


def test_shared_storages_count_once():
    module = nn.ModuleDict({"a": nn.Linear(8, 4, bias=False), "b": nn.Linear(8, 4, bias=False)})
    module["b"].weight = nn.Parameter(module["a"].weight.data[:2])
    module["a"].requires_grad_(False)
    kinds = MemoryKinds(module, [], CPU).count()
    assert (kinds["frozen weights"], kinds["adapter"]) == (8 * 4 * 4, 0)


def test_quantized_weights_and_weights_on_other_devices():
    module = nn.Module()
    module.stored = nn.Parameter(torch.zeros(100, dtype=torch.uint8), requires_grad=False)
    module.wide = nn.Parameter(torch.zeros(10, dtype=torch.bfloat16), requires_grad=False)
    module.elsewhere = nn.Parameter(torch.zeros(1000, device="meta"), requires_grad=False)
    kinds = MemoryKinds(module, [], CPU)
    assert kinds.count()["frozen weights"] == 120
    assert kinds.full_precision() == {"frozen weights": 20, "frozen elements": 10, "optimizer state": 0}


def eight_bit_optimizers():
    import bitsandbytes
    import torchao.optim

    return {"bitsandbytes": bitsandbytes.optim.AdamW8bit, "torchao": torchao.optim.AdamW8bit}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_eight_bit_optimizer_states(library):
    pytest.importorskip(library)
    size = 2**16
    layer = nn.Linear(256, 256, bias=False)
    optimizer = eight_bit_optimizers()[library](layer.parameters())
    layer(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    kinds = MemoryKinds(layer, [optimizer], CPU)
    # Two states of a byte each, and for every 256 elements a scale.
    assert 2 * size <= kinds.count()["optimizer state"] <= 2 * size * 1.1
    assert kinds.full_precision()["optimizer state"] < size / 10


def test_advice_follows_the_largest_kind():
    none = dict.fromkeys(KINDS, 0)
    full = {"frozen weights": 0, "frozen elements": 0, "optimizer state": 0}

    def first(kinds, full_precision, unused=0):
        return general_advice(none | kinds, full | full_precision, unused, "bf16-mixed")[0]

    gib = 2**30
    assert first({"frozen weights": gib}, {"frozen weights": gib, "frozen elements": gib // 2}) == (
        "store the frozen weights in 4 bits (a quantized base)",
        gib - gib * 9 // 32,
    )
    assert "checkpointing" in first({"activations": gib}, {})[0]
    assert "8 bits" in first({"optimizer state": gib, "frozen weights": gib}, {"optimizer state": gib})[0]
    assert "adapter" in first({"adapter": gib, "gradients": gib, "optimizer state": 2 * gib}, {})[0]
    assert "expandable_segments" in first({}, {}, unused=gib)[0]
    assert general_advice(none, full, 0, "32-true") == []


def test_a_phase_records_its_highest_peak_and_its_last_end():
    record = MemoryRecord()
    for step, peak in enumerate((10, 30, 20)):
        sizes = {"allocated": peak, "reserved": 100 - peak}
        record.add("forward", PhaseMemory(sizes, {"allocated": step}, {"activations": peak}, step))
    memory = record.phases["forward"]
    assert memory.peak == {"allocated": 30, "reserved": 90}
    assert (memory.end, memory.kinds, memory.step, memory.count) == ({"allocated": 2}, {"activations": 30}, 1, 3)


@pytest.mark.usefixtures("nothing_freed_before")
def test_the_meter_returns_freed_memory_to_the_system():
    meter = ProcessMeter(CPU)
    if meter.keeps_freed:
        pytest.skip("this C library decides by itself when to return memory")
    before = meter.current()["resident"]
    blocks = [bytearray(b"x" * 50_000) for _ in range(1000)]
    kept = blocks[::50]  # free blocks between them are not at the end of the heap
    blocks.clear()
    assert meter.current()["resident"] - before > 36 * MIB
    meter.reset()
    assert meter.peak()["resident"] - before < 24 * MIB
    del kept


def test_the_meter_can_be_reset():
    meter = ProcessMeter(CPU)
    before = meter.current()["resident"]
    block = torch.ones(64 * MIB // 4)
    assert meter.peak()["resident"] - before >= 60 * MIB
    del block
    meter.reset()
    assert meter.peak()["resident"] - before < 32 * MIB


def test_the_meter_notes_what_it_cannot_measure():
    meter = ProcessMeter(CPU, resettable=False)
    assert "does not let this process reset its peak" in meter.note
    before = meter.current()["resident"]
    block = torch.ones(64 * MIB // 4)
    assert meter.peak()["resident"] - before >= 60 * MIB
    del block


def test_the_chart_is_to_scale():
    sizes = dict(zip(KINDS, (100, 50, 25, 25, 200, 0), strict=True))
    chart = np.asarray(memory_chart({"forward": {kind: size * MIB for kind, size in sizes.items()}}, "memory"))
    row = chart[110 + 15]
    widths = {}
    for kind, colour in zip(KINDS, ("0072B2", "56B4E9", "009E73", "F0E442", "E69F00", "BBBBBB"), strict=True):
        widths[kind] = int((row == list(bytes.fromhex(colour))).all(axis=1).sum())
    scale = sum(widths.values()) / 400
    for kind, size in sizes.items():
        assert widths[kind] == pytest.approx(size * scale, abs=3)


def test_a_run_without_the_callback_does_not_import_it():
    code = (
        "import sys, lit_lora.callbacks, lit_lora.profiling.phases\n"
        "print(*[name for name in sys.modules if name == 'torch' or name.startswith('lit_lora.callbacks.')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.slow
def test_two_processes(tmp_path):
    processes([Path(__file__).with_name("ddp_memory_script.py"), tmp_path], 2, tmp_path)
    memory = json.loads((tmp_path / "memory.json").read_text())
    first, second = memory["ranks"]
    assert first == memory["peak"]["bytes"]
    assert second - first > 60 * MIB  # the second process holds 80 MiB more
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["this_run"]["samples"] == 2 * 3 * 2
    assert report["processes"] == 2
