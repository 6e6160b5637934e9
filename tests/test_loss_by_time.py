from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lit_lora.draws import Draws
from lit_lora.loss_by_time import LossByTime
from lit_lora.module import VALIDATION_SEED, LoraDiffusion
from lit_lora.tools.run_page.scalars import Curves, read_curves
from tests.helpers import loader_of, make_batches


def quarters_of(module: LoraDiffusion, batches: list[dict[str, Any]], seed: int) -> dict[int, float]:
    """Mean loss of the samples in each quarter that has some, from each sample's own timestep."""
    found: dict[int, list[float]] = {}
    for batch in batches:
        draws = Draws(seed, batch["slot"])
        with torch.no_grad():
            losses, weights = module.losses(batch, draws)
        times = module.objective.sample(torch.zeros(len(losses), 4, 8, 8), draws).timesteps
        for loss, weight, time in zip(losses.tolist(), weights.tolist(), times.tolist(), strict=True):
            if weight:
                found.setdefault(time * 4 // 1000 + 1, []).append(loss)
    return {quarter: sum(values) / len(values) for quarter, values in found.items()}


def logged(curves: Curves, stage: str, place: int) -> dict[int, float]:
    names = {quarter: f"{stage}/loss_q{quarter}" for quarter in range(1, 5)}
    return {quarter: curves[name][place][1] for quarter, name in names.items() if name in curves}


def test_the_loss_of_each_quarter_is_the_mean_of_its_samples(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """In training those of all batches since the last logged step; samples without weight do not count."""
    sd_module.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    train, val = make_batches(8), make_batches(3, seed=5)
    val[0]["weight"][1] = 0.0
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    more = {"logger": logger, "log_every_n_steps": 4, "max_steps": 4, "accumulate_grad_batches": 2}
    trainer = Trainer(**trainer_options | more, val_check_interval=4, num_sanity_val_steps=0)
    trainer.fit(sd_module, loader_of(train), loader_of(val))
    curves = read_curves(Path(logger.log_dir), [])
    assert logged(curves, "train", 0) == pytest.approx(quarters_of(sd_module, train, sd_module.seed), rel=1e-5)
    sd_module.eval()
    expected = quarters_of(sd_module, val, VALIDATION_SEED)
    assert len(expected) > 1
    assert logged(curves, "val", 0) == logged(curves, "val", 1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_each_of_several_loaders_logs_its_own_quarters(
    stage: str, sd_module: LoraDiffusion, trainer_options: dict[str, Any]
) -> None:
    batches = [make_batches(3, seed=seed) for seed in (5, 6)]
    trainer = Trainer(**trainer_options)
    found = getattr(trainer, stage)(sd_module, [loader_of(of_loader) for of_loader in batches], verbose=False)
    sd_module.eval()
    kind = stage.removesuffix("idate")
    for number, of_loader in enumerate(batches):
        expected = quarters_of(sd_module, of_loader, VALIDATION_SEED)
        logged = {q: trainer.callback_metrics[f"{kind}/loss_q{q}/dataloader_idx_{number}"].item() for q in expected}
        assert logged == pytest.approx(expected, rel=1e-5)
        assert f"{kind}/loss/dataloader_idx_{number}" in found[number]
    assert f"{kind}/loss_q1" not in trainer.callback_metrics


def test_a_quarter_without_samples_is_not_logged(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Nor is its last value logged again."""
    sd_module.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    batches = make_batches(4)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = Trainer(**trainer_options | {"logger": logger, "log_every_n_steps": 1, "max_steps": 4})
    trainer.fit(sd_module, loader_of(batches))
    curves = read_curves(Path(logger.log_dir), [])
    expected = [quarters_of(sd_module, [batch], sd_module.seed) for batch in batches]
    assert any(before.keys() - after.keys() for before, after in pairwise(expected))
    for step, quarters in enumerate(expected, start=1):
        names = {quarter: dict(curves.get(f"train/loss_q{quarter}", [])) for quarter in range(1, 5)}
        found = {quarter: curve[step] for quarter, curve in names.items() if step in curve}
        assert found == pytest.approx(quarters, rel=1e-5)


def test_sums_of_all_processes_are_divided(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the means of the processes averaged: one of them may have no sample in a quarter."""
    trainer = Trainer(**trainer_options)
    other = torch.tensor([[0.0, 0.0, 0.0, 8.0], [0.0, 0.0, 0.0, 2.0]])
    reduced: list[str] = []

    def reduce(value: torch.Tensor, reduce_op: str = "mean", **_: Any) -> torch.Tensor:
        if value.shape != (2, 4):
            return value
        reduced.append(reduce_op)
        return value + other

    monkeypatch.setattr(trainer.strategy, "reduce", reduce)
    batches = make_batches(1, seed=5)
    found = trainer.validate(sd_module, loader_of(batches), verbose=False)[0]
    alone = quarters_of(sd_module.eval(), batches, VALIDATION_SEED)
    assert 4 not in alone
    assert found["val/loss_q4"] == 4.0
    assert {quarter: found[f"val/loss_q{quarter}"] for quarter in alone} == pytest.approx(alone, rel=1e-5)
    assert reduced == ["sum"]


def test_a_loss_that_is_not_finite_stays_in_its_quarter() -> None:
    by_time = LossByTime()
    by_time.add(torch.tensor([math.nan, 3.0, 5.0]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.1, 0.5, 1.0]))
    [sums] = by_time._sums.values()
    assert sums[0].isnan().tolist() == [True, False, False, False]
    assert sums[:, 1:].tolist() == [[0.0, 3.0, 5.0], [0.0, 1.0, 0.0]]
