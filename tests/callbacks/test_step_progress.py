from __future__ import annotations

import logging
import re
import sys
import warnings
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lit_lora.callbacks import AdapterCheckpoint, BaseLoss, RunReport, SampleImages, StepMetrics, StepProgress
from lit_lora.datamodules import WebDatasetDataModule
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from tests.helpers import loader_of, make_batches

pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")


class Number(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What is printed from now on, as on a terminal."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def fit(module: LightningModule, data: Any, folder: Path, options: dict[str, Any], **more: Any) -> None:
    checkpoints = AdapterCheckpoint(folder, save_last=True, enable_version_counter=False)
    options = options | {"enable_progress_bar": True, "enable_checkpointing": True, "max_epochs": -1} | more
    Trainer(**{"callbacks": [StepMetrics(), StepProgress(refresh_seconds=0), checkpoints]} | options).fit(module, data)


@pytest.mark.parametrize("columns", [80, 100])
def test_the_screen_of_a_run(
    columns: int,
    sd_module: LoraDiffusion,
    session_shards: Path,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(columns))
    data = WebDatasetDataModule(str(session_shards), batch_size=4, resolution=16, num_workers=0)
    monkeypatch.chdir(tmp_path)
    fit(sd_module, data, Path("ck"), trainer_options, max_steps=4, accumulate_grad_batches=2, log_every_n_steps=2)
    lines = [line.rstrip() for line in re.split("[\r\n]+", terminal.getvalue()) if line.strip()]
    summary = [line for line in lines if re.match("(trains|data|length|last|adapter) ", line)]
    trained = sum(p.numel() for p in sd_module.parameters() if p.requires_grad)
    assert summary == [
        f"trains   Lora r={sd_module.adapter.r} in StableDiffusion: {trained:,} parameters",
        "data     32 samples, 8 in a step, 1 passes",
        "length   4 steps",
        f"last     {Path.cwd() / 'ck' / 'last.ckpt'}",
        f"adapter  {Path.cwd() / 'ck' / 'last.adapter'}",
    ]
    *following, prompt, adapter = lines[-4:]
    assert [*following, adapter] == ["Next:", "lit-lora sample \\", f"  --adapter {Path.cwd() / 'ck' / 'last.adapter'}"]
    assert re.fullmatch(r"  --prompts 'caption 00\d\d' \\", prompt), prompt  # a caption of the data
    bars = [line for line in lines if line.startswith("step ")]
    assert re.match(r"step 4/4 .*loss \d\S*, grad \d\S*, lr \S+, [\d.]+ img/s, 00:00 left$", bars[-1])
    assert all(len(bar) <= columns for bar in bars)


@pytest.mark.parametrize(
    ("caption", "prompts", "option"),
    [
        ("a cat", [], "--prompts 'a cat'"),
        ("a\ncat\x1b " + "on a mat " * 20, [], r"--prompts 'a cat\x1b " + "on a mat " * 6 + "on'"),
        ("-5 degrees", [], "--prompts='-5 degrees'"),
        ("", [], "--prompts 'what to draw'"),
        ("a cat", ["a dog's tail", "a mouse"], """--prompts 'a dog'"'"'s tail'"""),
    ],
)
def test_the_next_command_draws_what_was_trained(
    caption: str,
    prompts: list[str],
    option: str,
    sd_module: LoraDiffusion,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    callbacks = [StepProgress(), AdapterCheckpoint(tmp_path, save_last=True)]
    if prompts:
        callbacks.append(SampleImages(prompts, num_inference_steps=1))
    batch = make_batches(1)[0]
    batch["caption"] = [caption] * len(batch["caption"])
    fit(sd_module, loader_of([batch]), tmp_path, trainer_options | {"callbacks": callbacks}, max_steps=1)
    assert f"Next:\nlit-lora sample \\\n  {option} \\\n  --adapter {tmp_path}/last.adapter\n" in capsys.readouterr().err


@pytest.mark.parametrize(("bar", "takes_what_is_logged_for_bars"), [(StepProgress, False), (TQDMProgressBar, True)])
def test_the_loss_is_logged_for_the_bar_only_if_it_reads_no_other_metrics(
    bar: type[ProgressBar],
    takes_what_is_logged_for_bars: bool,
    sd_module: LoraDiffusion,
    trainer_options: dict[str, Any],
) -> None:
    options = trainer_options | {"callbacks": [bar()], "max_steps": 1, "enable_progress_bar": True}
    trainer = Trainer(**options)
    trainer.fit(sd_module, loader_of(make_batches(1)))
    assert ("train/loss" in trainer.progress_bar_metrics) == takes_what_is_logged_for_bars
    assert "train/loss" in trainer.callback_metrics


def test_a_module_that_knows_nothing_of_images(
    trainer_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Number(), loader_of([{"x": torch.zeros(2)}] * 3), tmp_path, trainer_options, max_steps=3)
    printed = capsys.readouterr().err
    assert "trains   Number: 3 parameters\nlength   3 steps\n" in printed
    assert re.search(r"step 3/3, lr 0.5", printed)


class Validated(Number):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(0.25))


def test_no_step_spans_two_passes(
    session_shards: Path, trainer_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight batches are three steps; the last one's gradient is two thirds of the others', as docs/memory.md says."""
    module = Validated()
    data = WebDatasetDataModule(str(session_shards), batch_size=4, resolution=16, num_workers=0)
    fit(module, data, tmp_path, trainer_options, max_steps=6, accumulate_grad_batches=3)
    assert "data     32 samples, 12 in a step, 2 passes\n" in capsys.readouterr().err
    torch.testing.assert_close(module.weight.detach(), torch.full((3,), -0.5 * 2 * (1 + 1 + 2 / 3)))


@pytest.mark.parametrize("beside_base", [False, True])
def test_each_validation_loss_is_printed_once(
    beside_base: bool, trainer_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [StepProgress(), *([BaseLoss("val_loss")] if beside_base else [])]
    checks = {"num_sanity_val_steps": -1, "limit_val_batches": 1, "max_epochs": 2, "enable_progress_bar": True}
    loaders = loader_of([{"x": torch.zeros(2)}] * 2)
    trainer = Trainer(**trainer_options | checks | {"callbacks": callbacks})
    trainer.fit(Validated(), loaders, loaders)
    ends = ", +0.0% against the base" if beside_base else ""
    printed = [line for line in capsys.readouterr().err.splitlines() if "val_loss" in line]
    assert [line for line in printed if not line.startswith("step 0")] == [
        f"step {step}: val_loss 0.2500{ends}" for step in (2, 4)
    ] + (["val_loss never fell below that of the base, 0.2500: 0.2500 at best"] if beside_base else [])


@pytest.mark.parametrize(("seconds", "steps"), [(0, [1, 2, 3, 4]), (1e9, [4])])
def test_a_log_has_lines_in_place_of_a_bar(
    seconds: float,
    steps: list[int],
    sd_module: LoraDiffusion,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    callbacks = {"callbacks": [StepProgress(line_seconds=seconds)]}
    options = trainer_options | {"accumulate_grad_batches": 2} | callbacks
    fit(sd_module, loader_of(make_batches(8)), tmp_path, options, max_steps=4)
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == steps
    assert "\r" not in printed[printed.index("trains ") :]
    assert re.fullmatch(r"step 4/4, loss \d\S*, lr \S+, [\d.]+ img/s, 00:00 left", lines[-1])


@pytest.mark.parametrize(("application", "is_bar"), [("IPKernelApp", True), ("TerminalIPythonApp", False)])
def test_a_notebook_has_a_bar(
    application: str,
    is_bar: bool,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell = SimpleNamespace(config={application: {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    fit(Number(), loader_of([{"x": torch.zeros(2)}] * 3), tmp_path, trainer_options, max_steps=3)
    printed = capsys.readouterr().err
    assert ("\rstep 3/3" in printed) == is_bar
    assert ("\nstep 3/3" in printed) != is_bar


def test_a_run_without_a_known_end_has_lines_too(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ends(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    callbacks = {"callbacks": [StepProgress(), Ends()]}
    fit(sd_module, loader_of(make_batches(8)), tmp_path, trainer_options | callbacks, max_steps=-1)
    assert re.search(r"^step 2, loss \S+, lr \S+, [\d.]+ img/s$", capsys.readouterr().err, re.MULTILINE)


def test_without_steps_the_beginning_and_the_end_are_told(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = StepProgress(line_seconds=0)
    progress.shows_steps = False
    checkpoints = AdapterCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    callbacks = {"callbacks": [progress, checkpoints]}
    fit(sd_module, loader_of(make_batches(2)), tmp_path, trainer_options | callbacks, max_steps=2)
    shown = [line.split()[0] for line in capsys.readouterr().err.splitlines() if line]
    assert [word for word in shown if word in ("trains", "length", "step", "last")] == ["trains", "length", "last"]


def test_messages_of_others_have_lines_of_their_own(
    sd_module: LoraDiffusion,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)

    class Talks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            rank_zero_info("news of a callback")
            warnings.showwarning("a warning of one", UserWarning, "file.py", 3)

    def show(message: Warning | str, *_: Any) -> None:
        print(message, file=sys.stderr)

    monkeypatch.setattr(warnings, "showwarning", show)
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "handlers", before := [logging.StreamHandler(sys.stderr)])
    callbacks = {"callbacks": [StepProgress(refresh_seconds=0), Talks()]}
    fit(sd_module, loader_of(make_batches(2)), tmp_path, trainer_options | callbacks, max_steps=2)
    assert (logger.handlers, warnings.showwarning) == (before, show)
    lines = re.split("[\r\n]+", terminal.getvalue())
    assert lines.count("news of a callback") == 2
    assert lines.count("a warning of one") == 2


def test_an_interrupted_run_shows_its_bar_once(
    sd_module: LoraDiffusion,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is printed while it ends leaves no second bar behind."""
    terminal = on_terminal(monkeypatch)

    class Interrupts(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", sys.stderr)  # as on a terminal
    callbacks = {"callbacks": [RunReport(), StepProgress(refresh_seconds=0), Interrupts()]}
    with pytest.raises(SystemExit):
        fit(sd_module, loader_of(make_batches(4)), tmp_path, trainer_options | callbacks, max_steps=4)
    shown = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")]
    assert "Run report (interrupted)" in shown
    assert len([line for line in shown if line.startswith("step ")]) == 1


def test_seconds_have_a_bound() -> None:
    with pytest.raises(UserError, match="refresh_seconds=-1 is too small; it must be at least 0"):
        StepProgress(refresh_seconds=-1)
    with pytest.raises(UserError, match="line_seconds=-1 is too small; it must be at least 0"):
        StepProgress(line_seconds=-1)
