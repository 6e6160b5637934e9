"""A fit that a signal has stopped is resumed exactly; test_faults.py tests this with several processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader

from lit_lora import AdapterCheckpoint, AdapterEMA, LoraDiffusion, Preemption, StableDiffusion, WebDatasetDataModule
from lit_lora.lightning_cli import run
from tests.job_run import write_job
from tests.warm_python import WarmPython

SLOW_SCRIPT = Path(__file__).parent / "slow_step_script.py"


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Lightning leaves Ctrl-C ignored once it has ended a run."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Signal(Callback):
    """Sends this process a signal before a batch, or in the sanity check."""

    def __init__(self, before_batch: int | None, number: int = signal.SIGTERM) -> None:
        self.before_batch = before_batch
        self.number = number

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.before_batch is None:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.before_batch:
            os.kill(os.getpid(), self.number)


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", batch.mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_line(options: dict[str, Any], *callbacks: Callback, resume: str | None = None, **more: Any) -> Trainer:
    data: Any = torch.ones(8, 1)
    options = options | {"enable_checkpointing": True, "max_steps": 6, "callbacks": list(callbacks)} | more
    trainer = Trainer(**options)
    trainer.fit(Line(), DataLoader(data), DataLoader(data[:1]), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(
    accumulated: int,
    number: int,
    name: str,
    sd_folder: Path,
    make_shards: Callable[..., list[Path]],
    trainer_options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_shards(7, 12)

    def fit(folder: str, *callbacks: Callback, resume: str | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=2, lora_dropout=0.2)
        module = LoraDiffusion(StableDiffusion(str(sd_folder)), config, base_dtype="float32")
        ema = AdapterEMA(0.9)
        trainer = Trainer(
            **trainer_options
            | {"enable_checkpointing": True, "max_steps": 5, "accumulate_grad_batches": accumulated}
            # Ours comes first, and yet what the average does at the end of a batch is saved.
            | {"callbacks": [Preemption(), *callbacks, ema, AdapterCheckpoint(tmp_path / folder)]}
        )
        data = WebDatasetDataModule(str(tmp_path / "shards"), batch_size=2, resolution=16, num_workers=0, val_samples=2)
        trainer.fit(module, data, ckpt_path=resume)
        average = ema.state_dict()["shadow_params"]
        return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad} | {"average": average}

    expected = fit("whole")
    with pytest.raises(SIGTERMException) as stopped:
        fit("stopped", Signal(3, number))  # with accumulation the first batch of a step
    assert stopped.value.code == 128 + number
    last = tmp_path / "stopped" / "last.ckpt"
    step = 4 if accumulated == 1 else 2
    assert torch.load(last, weights_only=True)["global_step"] == step
    line = f"lit-lora: stopped by {name} at step {step}; saved {last}; resume with --ckpt_path last\n"
    assert line in capsys.readouterr().err
    got = fit("stopped", resume="last")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Validations(Callback):
    """Steps after which the run validated."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize(
    ("interval", "accumulated", "batch", "stopped_at"),
    [(2, 1, 1, 2), (1, 1, 1, 2), (1, 2, 1, 1), (3, 2, 2, 2)],
    ids=["after-some-steps", "after-each-step", "after-each-batch", "within-a-step"],
)
def test_a_signal_when_validation_is_due_takes_effect_after_it(
    interval: int,
    accumulated: int,
    batch: int,
    stopped_at: int,
    kind: type[ModelCheckpoint],
    trainer_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    more: dict[str, Any] = {"val_check_interval": interval, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    more |= {"accumulate_grad_batches": accumulated, "max_steps": 6 // accumulated}
    alone, stopped = Validations(), Validations()
    fit_line(trainer_options, alone, **more)
    with pytest.raises(SIGTERMException):
        fit_line(trainer_options, Preemption(), Signal(batch), stopped, kind(tmp_path), **more)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == stopped_at
    fit_line(trainer_options, Preemption(), stopped, kind(tmp_path), resume="last", **more)
    assert stopped.steps == alone.steps


def test_the_newest_checkpoint_is_used_after_a_preemption(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    saving = {"every_n_train_steps": 2, "save_top_k": -1}
    with pytest.raises(SIGTERMException):
        fit_line(trainer_options, Preemption(), Signal(2), AdapterCheckpoint(tmp_path, **saving))
    fit_line(trainer_options, AdapterCheckpoint(tmp_path, **saving), resume="last")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    trainer = fit_line(trainer_options, AdapterCheckpoint(tmp_path, **saving), resume="last", max_steps=7)
    assert "step=6" in str(trainer.ckpt_path)


@pytest.mark.filterwarnings("ignore:loss was never logged")
@pytest.mark.parametrize(
    "options",
    [
        {"every_n_train_steps": 3, "save_last": "link"},
        {"every_n_train_steps": 1, "save_last": True},
        {"every_n_train_steps": 100, "monitor": "loss"},
        {"every_n_train_steps": 1, "save_weights_only": True},
    ],
    ids=lambda options: "-".join(list(options)[1:]),
)
@pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint])
def test_last_is_found_however_checkpoints_are_saved(
    kind: type[ModelCheckpoint], options: dict[str, Any], trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SIGTERMException):
        fit_line(trainer_options, kind(tmp_path, save_top_k=-1, **options), Preemption(), Signal(before_batch=3))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    for path in tmp_path.glob("epoch*.ckpt"):  # nothing is written through a link
        assert f"step={torch.load(path, weights_only=True)['global_step']}." in path.name
    saved = kind(tmp_path, **options)
    assert fit_line(trainer_options, saved, Preemption(), resume="last").global_step == 6
    assert saved.save_last is options.get("save_last")


def test_a_link_to_the_last_checkpoint_becomes_a_checkpoint(
    sd_module: LoraDiffusion, make_shards: Callable[..., list[Path]], trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """The adapter's folders, which are links in this case, become folders too."""
    make_shards(12)
    checkpoints = AdapterCheckpoint(tmp_path / "here", every_n_train_steps=2, save_last="link")
    callbacks = [checkpoints, AdapterEMA(), Signal(before_batch=2), Preemption()]
    trainer = Trainer(**trainer_options | {"enable_checkpointing": True, "max_steps": 5, "callbacks": callbacks})
    with pytest.raises(SIGTERMException):
        trainer.fit(sd_module, WebDatasetDataModule(str(tmp_path / "shards"), resolution=16, val_samples=2))
    for kind in ("ckpt", "adapter", "ema.adapter"):
        assert (tmp_path / "here" / f"epoch=0-step=2.{kind}").exists()
        assert (tmp_path / "here" / f"last.{kind}").exists()
        assert not (tmp_path / "here" / f"last.{kind}").is_symlink()


def test_nothing_is_saved_without_a_checkpoint_callback(
    trainer_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SIGTERMException):
        fit_line(trainer_options, Preemption(), Signal(before_batch=1), enable_checkpointing=False)
    assert (
        "stopped by SIGTERM at step 2; nothing was saved, since the trainer has no checkpoint"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_signal_in_the_sanity_check_stops_after_the_first_step(
    trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SIGTERMException):
        fit_line(trainer_options, AdapterCheckpoint(tmp_path), Preemption(), Signal(before_batch=None))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_ctrl_c_before_the_first_step_stops_at_once(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit_line(trainer_options, AdapterCheckpoint(tmp_path), Preemption(), Signal(0, signal.SIGINT))
    assert isinstance(stopped.value.__context__, KeyboardInterrupt)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # by Lightning, since Ctrl-C is often pressed many times


class Twice(Callback):
    """Sends Ctrl-C before the third batch, and again some seconds later."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.monkeypatch = seconds, monkeypatch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGINT)
            now = time.monotonic() + self.seconds
            self.monkeypatch.setattr(time, "monotonic", lambda: now)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("seconds", "saved"), [(0.5, True), (4.0, False)])
def test_a_second_ctrl_c_stops_at_once_unless_it_is_the_same_one(
    seconds: float,
    saved: bool,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit_line(trainer_options, AdapterCheckpoint(tmp_path), Preemption(), Twice(seconds, monkeypatch))
    assert (tmp_path / "last.ckpt").exists() == isinstance(stopped.value, SIGTERMException) == saved
    assert capfd.readouterr().err.count("lit-lora: saving after this step; Ctrl-C again, after 3 s, stops at once") == 1


def test_ctrl_c_after_a_run_is_as_before(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    fit_line(trainer_options, AdapterCheckpoint(tmp_path), Preemption())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_is_ignored_stays_so(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    """As in the background of a shell script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = fit_line(trainer_options, AdapterCheckpoint(tmp_path), Preemption(), Signal(2, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.global_step == 6


@pytest.mark.parametrize("stopped", [False, True])
def test_previous_handlers_are_restored(stopped: bool, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    """Other stages, and runs without the callback, keep Lightning's handlers."""
    ours: list[bool] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            ours.append(isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Preemption))

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.state.fn == "validate":
                self.on_train_start(trainer, pl_module)

    def own(number: int, frame: Any) -> None:
        raise AssertionError("the run takes the signal")

    before = signal.signal(signal.SIGTERM, own)
    try:
        callbacks = AdapterCheckpoint(tmp_path), Preemption(), Look()
        if stopped:
            with pytest.raises(SIGTERMException):
                fit_line(trainer_options, *callbacks, Signal(before_batch=2))
        else:
            fit_line(trainer_options, *callbacks).validate(Line(), DataLoader(torch.ones(1, 1)))  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGTERM) is own
        fit_line(trainer_options, Look(), enable_checkpointing=False)
        assert ours == ([True, False] if stopped else [True, False, False])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "array", "status", "said", "requeued"),
    [
        (signal.SIGUSR1, False, 0, "stopped by SIGUSR1 at step 2; .*; job 77 is requeued", "requeue 77"),
        (signal.SIGUSR1, True, 0, "; job 70_7 is requeued", "requeue 70_7"),
        (signal.SIGUSR1, False, 1, r"; job 77 could not be requeued \(scontrol: no\); submit it", "requeue 77"),
        (signal.SIGTERM, False, 0, "stopped by SIGTERM at step 2; .* resume with --ckpt_path last\n", ""),
    ],
)
def test_a_slurm_job_is_requeued(
    number: signal.Signals,
    array: bool,
    status: int,
    said: str,
    requeued: str,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\nprintf "$*" > {tmp_path}/asked\necho no >&2\nexit {status}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    variables = {"JOB_ID": "77", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    variables |= {"ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": "7"} if array else {}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SIGTERMException) as stopped:
        fit_line(trainer_options, AdapterCheckpoint(tmp_path), Preemption(), Signal(1, number))
    assert stopped.value.code == 128 + number
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == requeued
    assert re.search(said, capsys.readouterr().err)


def test_the_plugin_sets_the_requeue_signal(
    trainer_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``auto_requeue=False`` no signal requeues the job."""
    for name, value in {"JOB_ID": "77", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", str(tmp_path))  # without scontrol
    plugin = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    with pytest.raises(SIGTERMException) as stopped:
        callbacks = AdapterCheckpoint(tmp_path), Preemption(), Signal(1, signal.SIGUSR2)
        fit_line(trainer_options, *callbacks, plugins=[plugin])
    assert stopped.value.code == 128 + signal.SIGUSR2

    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        callbacks = AdapterCheckpoint(tmp_path / "other"), Preemption(), Signal(1, signal.SIGUSR1)
        fit_line(trainer_options, *callbacks, plugins=[SLURMEnvironment(auto_requeue=False)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]


@pytest.mark.parametrize("configured", [[], [{"class_path": "Preemption"}]])
def test_lit_lora_fit_adds_one_preemption(
    configured: list[dict[str, Any]], sd_folder: Path, make_shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    make_shards(2)
    config = write_job(tmp_path / "run", sd_folder, tmp_path / "shards", *configured, processes=1, strategy="auto")
    callbacks = run(["fit", "--config", str(config)]).trainer.callbacks
    assert [type(callback) for callback in callbacks].count(Preemption) == 1


@pytest.mark.slow
def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Two signals in quick succession count once, since launchers forward signals that their processes have already received."""
    script = WarmPython([str(SLOW_SCRIPT), str(tmp_path)], os.environ)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "in a step").exists():
            assert script.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        script.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            script.wait(4)
        while script.poll() is None:  # a busy machine may have been late with the first one
            assert time.monotonic() < deadline
            script.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert script.returncode == -signal.SIGTERM
    finally:
        script.kill()
        script.wait()
    assert not list(tmp_path.rglob("*.ckpt"))
