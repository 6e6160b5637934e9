"""What a run shows on the screen: what it trains, one bar over its optimizer steps, and where its files are."""

from __future__ import annotations

import math
import shlex
import sys
import textwrap
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from torch.optim import Optimizer
from tqdm import tqdm

from lit_lora.batch_size import batch_size
from lit_lora.callbacks.base_loss import BaseLoss
from lit_lora.callbacks.checkpoint_files import adapter_folders
from lit_lora.callbacks.sample_images import SampleImages
from lit_lora.callbacks.step_metrics import learning_rate
from lit_lora.errors import check_least
from lit_lora.loops import passes_in
from lit_lora.parameters import trainable_parameters
from lit_lora.progress_bar import messages_above_bar
from lit_lora.report_text import format_next, format_option
from lit_lora.visible import visible


class StepProgress(ProgressBar):
    """One progress bar over all optimizer steps of a fit, with loss, gradient norm, lr, images per second and the time left.

    Where the output is neither a terminal nor a notebook, as in the log of a batch job, a line comes now and then in place of the
    bar. At the start it prints what is trained on what, after each validation its loss (unless ``BaseLoss`` does), and at the
    end where the checkpoints are. It works with any LightningModule. ``lit-lora fit`` uses it in place of Lightning's bars,
    unless the config has a progress bar; with ``trainer.enable_progress_bar: false`` it prints neither bar nor lines about steps.

    Args:
        refresh_seconds: Seconds between two updates of the bar; reading the loss waits for the GPU. Defaults to 1.
        line_seconds: Seconds between two lines where there is no bar. Defaults to 30. The last step has a line, too.

    Raises:
        UserError: If one of them is negative.
    """

    reads_all_metrics: ClassVar[bool] = True
    """Whether it shows what is logged without ``prog_bar=True`` too; see :func:`lit_lora.progress_bar.shows_logged`."""

    def __init__(self, refresh_seconds: float = 1.0, line_seconds: float = 30.0) -> None:
        super().__init__()
        check_least(0, refresh_seconds=refresh_seconds, line_seconds=line_seconds)
        self.refresh_seconds, self.line_seconds = refresh_seconds, line_seconds
        self.shows_steps = True
        """Whether it shows a bar or lines about the steps, and not the beginning and the end alone."""
        self.lists_files = True
        """Whether it prints where the checkpoints are at the end; ``lit-lora train`` prints that itself."""
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._training = False
        self._ended = False
        self._caption = ""
        self._above = ExitStack()
        """Has messages of others printed above the bar while there is one."""

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self._enabled and trainer.is_global_zero):
            return
        steps = _total_steps(trainer)
        for line in _summary(trainer, pl_module, steps):
            self.print(line)
        self._training, self._total, self._shown = True, steps, trainer.global_step
        self._samples, self._seconds, self._first_step = 0, 0.0, trainer.global_step
        self._began = self._refreshed = time.monotonic()
        self._lr: float | None = None
        if self.shows_steps and (sys.stderr.isatty() or _in_notebook()):
            self._refreshed = 0.0
            self._bar = tqdm(
                total=steps,
                initial=trainer.global_step,
                dynamic_ncols=True,
                file=sys.stderr,
                bar_format="step {n_fmt}/{total_fmt} {bar} {desc}, {remaining} left",
            )
            self._bar.set_description_str("starting")
            self._above.enter_context(messages_above_bar())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.monotonic()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._lr = learning_rate(optimizer)  # here, since schedules step before the end of the batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._training:
            return
        now = time.monotonic()
        self._seconds += now - self._start
        self._samples += (batch_size(batch) or 0) * trainer.world_size
        self._caption = self._caption or _first_caption(batch)
        between = self.line_seconds if self._bar is None else self.refresh_seconds
        if now - self._refreshed >= between or trainer.global_step == self._total:
            self._refreshed = now
            self._show(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # ``BaseLoss`` prints it beside the base's.
        others = any(isinstance(one, BaseLoss) for one in trainer.callbacks)  # type: ignore[attr-defined]
        if not self._training or not self.shows_steps or others:
            return
        for name, loss in trainer.callback_metrics.items():
            if name.partition("/dataloader_idx_")[0] in ("val/loss", "val_loss"):
                self.print(f"step {trainer.global_step:,}: {name} {float(loss):.4f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training:
            self._show(trainer, pl_module)
            self._close()
            self._ended = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._ended and self.lists_files:  # here, where the last checkpoint is written
            for line in _files(trainer):
                self.print(line)
            if hasattr(pl_module, "family") and (adapters := _adapters(trainer)):
                adapter = shlex.quote(str(adapters[-1]))
                prompt = format_option("prompts", _prompt(trainer) or self._caption or "what to draw")
                self.print(format_next("lit-lora sample", prompt, f"--adapter {adapter}"))
        self._ended = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            print(*args, file=sys.stderr, **kwargs)
        else:
            self._bar.write(" ".join(map(str, args)), file=sys.stderr)

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the bar, or print a line about a step that has none yet."""
        step = trainer.global_step
        if self._bar is not None:
            self._bar.set_description_str(self._figures(trainer, pl_module), refresh=False)
            self._bar.n = step
            self._bar.refresh()
        elif self.shows_steps and step > self._shown:
            self._shown = step
            done = f"step {step}" if self._total is None else f"step {step}/{self._total}"
            self.print(", ".join([done, *filter(None, [self._figures(trainer, pl_module)]), *self._time_left(step)]))

    def _time_left(self, step: int) -> list[str]:
        if self._total is None or step == self._first_step:
            return []
        seconds = (time.monotonic() - self._began) / (step - self._first_step) * (self._total - step)
        return [f"{tqdm.format_interval(seconds)} left"]

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> str:
        metrics = trainer.callback_metrics
        loss = next((float(metrics[name]) for name in ("train/loss", "train_loss", "loss") if name in metrics), None)
        figures = [] if loss is None else [f"loss {loss:.4g}"]
        if (norm := metrics.get("train/gradient_norm")) is not None:  # of StepMetrics
            figures.append(f"grad {float(norm):.2g}")
        if self._lr is not None:
            figures.append(f"lr {self._lr:.2g}")
        if self._samples and self._seconds:
            rate = self._samples / self._seconds
            figures.append(f"{rate:.3g} img/s" if rate < 1000 else f"{rate:.0f} img/s")
        return ", ".join(figures)

    def _close(self) -> None:
        self._training = False
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._above.close()


def _in_notebook() -> bool:
    """Whether the output is that of a notebook's cell, which is no terminal but updates a line; found as ``tqdm.auto`` does."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_shell() if get_shell else None
    return shell is not None and "IPKernelApp" in shell.config


def _total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps until the run ends; None if nothing but time or a callback ends it."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def _summary(trainer: Trainer, pl_module: LightningModule, steps: int | None) -> list[str]:
    """What is trained on what, in lines of at most 80 columns for usual names."""
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable_parameters(pl_module))
    family, adapter = getattr(pl_module, "family", None), getattr(pl_module, "adapter", None)
    what = type(pl_module).__name__
    if family is not None and adapter is not None:
        rank = getattr(adapter, "r", None)
        method = type(adapter).__name__.removesuffix("Config") + (f" r={rank}" if rank else "")
        what = f"{method} in {type(family).__name__}"
    lines = [f"trains   {what}: {count:,} parameters"]
    if family is not None:
        lines.append(f"base     {getattr(family, 'pretrained_model_name_or_path', '')}")
    make_plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
    if make_plan is not None:
        plan = make_plan()
        batch = plan.global_batch_size * trainer.accumulate_grad_batches
        passes = ""
        if steps is not None:
            passes = f", {passes_in(steps, plan.batches_per_pass, trainer.accumulate_grad_batches):.3g} passes"
        samples = "sample" if plan.num_samples == 1 else "samples"
        lines.append(f"data     {plan.num_samples:,} {samples}, {batch} in a step{passes}")
    if steps is not None:
        first = f" from step {trainer.global_step:,} on" if trainer.global_step else ""
        lines.append(f"length   {steps:,} steps{first}")
    return lines


def _checkpoints(trainer: Trainer) -> list[tuple[str, str]]:
    """The last and the best checkpoint of each callback that saves some."""
    found = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            last, best = callback.last_model_path, callback.best_model_path
            if best == last or (callback.monitor is None and last):
                best = ""
            found += [(name, path) for name, path in (("last", last), ("best", best)) if path]
    return found


def _files(trainer: Trainer) -> list[str]:
    """Where the run's checkpoints and adapters are."""
    lines = []
    for name, path in _checkpoints(trainer):
        lines.append(f"{name:8} {path}")
        lines += [f"adapter  {folder}"] if (folder := adapter_folders(path)[0]).exists() else []
    return lines


def _adapters(trainer: Trainer) -> list[Path]:
    """The adapters of the run's checkpoints, the best one last."""
    return [folder for _, path in _checkpoints(trainer) if (folder := adapter_folders(path)[0]).exists()]


def _prompt(trainer: Trainer) -> str:
    """What the run's samples are drawn for: the first prompt, or the file of prompts; empty if there are no samples."""
    samples = SampleImages.of(trainer)
    return samples.given[0] if samples else ""


def _first_caption(batch: Any) -> str:
    """The beginning of a batch's first caption as one line; empty if there is none."""
    captions = batch.get("caption") if isinstance(batch, Mapping) else None
    texts = [one for one in captions if isinstance(one, str)] if isinstance(captions, list | tuple) else []
    return visible(textwrap.shorten(texts[0], 64, placeholder="")) if texts else ""
