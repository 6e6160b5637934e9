"""Objectives whose own loss ignores masks or weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from torch import Tensor

from lit_lora.datamodules import ImageDecoder, WebDatasetDataModule
from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.objectives import DDPM, NoisySample, PriorPreservation
from tests.helpers import diffusion_module, loader_of, make_batches

WITHOUT_MASK = "the loss of Ignoring ignores the masks of the data .*end it with self.mean_errors"


class Ignoring(DDPM):
    """Leaves out both."""

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        return (prediction - sample.target).square().flatten(1).mean(1)


class Heeding(DDPM):
    """Does both without ``mean_errors``."""

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        errors = (prediction - sample.target).square()
        return (errors if sample.mask is None else errors * sample.mask).flatten(1).mean(1) * sample.weight


def test_set_up_refuses_masks_that_the_loss_ignores(
    sd_folder: Path, session_shards: Path, trainer_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = WebDatasetDataModule(str(session_shards), decoder=ImageDecoder(mask="alpha"), resolution=16, num_workers=0)
    module = diffusion_module(sd_folder, LoraConfig(r=2), objective=Ignoring())
    monkeypatch.setattr(module.family, "load", lambda *_, **__: pytest.fail("the base is read first"))
    with pytest.raises(UserError, match=WITHOUT_MASK):
        Trainer(**trainer_options, max_steps=1).fit(module, datamodule=data)
    assert module.objective.training


@pytest.mark.parametrize("kind", [Ignoring, Heeding])
def test_masks_of_other_data(sd_folder: Path, kind: Callable[[], DDPM], trainer_options: dict[str, Any]) -> None:
    batches = [batch | {"loss_mask": torch.zeros(2, 1, 16, 16, dtype=torch.uint8)} for batch in make_batches(1)]
    module = diffusion_module(sd_folder, LoraConfig(r=2), objective=kind())
    trainer = Trainer(**trainer_options, max_steps=1)
    if kind is Ignoring:
        with pytest.raises(UserError, match=WITHOUT_MASK):
            trainer.fit(module, loader_of(batches))
    else:
        trainer.fit(module, loader_of(batches))
        assert trainer.callback_metrics["train/loss"] == 0


def test_prior_preservation_needs_weights(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = diffusion_module(sd_folder, LoraConfig(r=2), objective=Ignoring(prior=PriorPreservation("0-*")))
    with pytest.raises(UserError, match=r"ignores sample.weight, so that prior preservation has no effect; end it"):
        Trainer(**trainer_options, max_steps=1).fit(module, loader_of(make_batches(1)))


def test_what_heeds_both_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Heeding()
    objective.prepare({"_class_name": "DDPMScheduler"})
    sample = objective.sample(torch.zeros(2, 4, 2, 2), Draws(0, range(2)))
    calls: list[NoisySample] = []
    monkeypatch.setattr(Heeding, "loss", lambda *args: calls.append(args[-1]) or torch.tensor(float(len(calls))))
    for _ in range(2):
        assert objective.counted(sample, {"loss_mask": torch.ones(2, 1, 2, 2)}).mask is not None
    assert len(calls) == 2
