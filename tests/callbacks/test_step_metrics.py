from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lit_lora.callbacks import StepMetrics, step_metrics
from lit_lora.profiling.phases import phase
from lit_lora.tools.run_page.scalars import read_curves
from tests.helpers import loader_of

SECONDS = {"step": 2.0, "validation": 100.0, "sampling": 1000.0}


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


class Linear(LightningModule):
    """Its gradient is 3 and 4 times the batch's number."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.a, self.b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.clock.now += SECONDS["step"]
        return (batch["x"].mean() * (3 * self.a + 4 * self.b)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += SECONDS["validation"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([{"params": [self.a], "lr": 8.0}, {"params": [self.b]}], lr=1.0)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]


class Draws(Callback):
    """Takes the time of :class:`SampleImages` after each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        with phase("sampling"):
            self.clock.now += SECONDS["sampling"]


def test_rate_norm_and_throughput_of_steps(
    trainer_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm is of all gradients that were accumulated, before they are clipped; pauses do not count."""
    clock = Clock()
    monkeypatch.setattr(step_metrics, "time", clock)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = Trainer(
        **trainer_options | {"logger": logger, "callbacks": [StepMetrics(), Draws(clock)], "max_steps": 6},
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        val_check_interval=4,
        gradient_clip_val=0.1,
        num_sanity_val_steps=0,
    )
    batches = [{"x": torch.full((5,), float(number))} for number in range(12)]
    trainer.fit(Linear(clock), loader_of(batches), loader_of([{}]))
    curves = read_curves(Path(logger.log_dir), [])
    assert curves["train/lr"] == [(2, 0.5), (4, 0.125), (6, 0.03125)]
    norms = [5 * (number + number + 1) / 2 for number in (2, 6, 10)]  # of steps 2, 4 and 6
    assert [norm for _, norm in curves["train/gradient_norm"]] == pytest.approx(norms)
    # Two steps of two batches of five samples in four times two seconds; the first batch is not measured.
    assert curves["train/images_per_second"] == [(step, pytest.approx(2.5)) for step in (2, 4, 6)]
