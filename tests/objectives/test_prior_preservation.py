"""Prior preservation against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig

from lit_lora.datamodules import ImageDecoder, WebDatasetDataModule
from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from lit_lora.objectives import DDPM, FlowMatching, MinSNR, Objective, PriorPreservation
from lit_lora.tools.cache import cache_shards

LATENTS = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
KEYS = ["dog_1", "class_1", "dog_2", "class_2"]
PRIOR = PriorPreservation("class_*", 0.3)


@pytest.mark.parametrize(
    ("objective", "scheduler"),
    [
        (DDPM(weighting=MinSNR(), prior=PRIOR), "DDPMScheduler"),
        (FlowMatching(prior=PRIOR), "FlowMatchEulerDiscreteScheduler"),
        (FlowMatching(prior=PriorPreservation(weight=0.3)), "FlowMatchEulerDiscreteScheduler"),
    ],
)
@pytest.mark.parametrize("with_mask", [False, True])
def test_the_formula(objective: Objective, scheduler: str, with_mask: bool) -> None:
    objective.prepare({"_class_name": scheduler})
    objective.train()
    sample = objective.sample(LATENTS, Draws(0, range(4)))
    prediction = torch.zeros_like(LATENTS)
    batch = {"key": KEYS, "prior": [False, True, False, True]}
    share = torch.ones(4, 1, 2, 2)
    if with_mask:
        share[:, :, 1] = 0.5
        batch |= {"loss_mask": share}
    losses = objective.loss(prediction, objective.counted(sample, batch))
    errors = sample.weight * (share * (prediction - sample.target) ** 2).mean(dim=(1, 2, 3))
    # Equation 2: the subject's loss plus the weight times the class's; the mean over all samples is half of it.
    torch.testing.assert_close(2 * losses.mean(), errors[[0, 2]].mean() + 0.3 * errors[[1, 3]].mean())
    objective.eval()
    assert torch.equal(objective.loss(prediction, objective.counted(sample, batch)), objective.loss(prediction, sample))


def test_batches_without_keys() -> None:
    objective = FlowMatching(prior=PRIOR)
    objective.prepare({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    sample = objective.sample(LATENTS, Draws(0, range(4)))
    with pytest.raises(UserError, match="tells class images by their keys, and the batch has no 'key'"):
        objective.counted(sample, {"caption": KEYS})


def test_values_out_of_range() -> None:
    with pytest.raises(UserError, match=r"weight=0.0 is too small; it must be above 0"):
        PriorPreservation("class_*", 0.0)
    with pytest.raises(UserError, match="class_keys is empty"):
        PriorPreservation("")


@pytest.mark.parametrize(("key", "which"), [("dog/1", "none"), ("class_1", "all")])
def test_images_of_one_kind_alone(key: str, which: str) -> None:
    prior = PriorPreservation("class_*")
    batch = {"key": [key] * 400}
    prior.weights(batch, torch.device("cpu"))
    prior.weights(batch, torch.device("cpu"))
    with pytest.warns(
        UserWarning, match=rf"has taken {which} of the first 1,200 samples .*such as '{key}' against class_keys"
    ):
        prior.weights(batch, torch.device("cpu"))
    prior.weights(batch, torch.device("cpu"))  # once; a warning would be an error


@pytest.mark.parametrize("count", [19, 20])
def test_a_short_run_with_images_of_one_kind(count: int) -> None:
    objective = FlowMatching(prior=PriorPreservation("class_*"))
    assert objective.prior is not None
    objective.prior.weights({"key": ["dog"] * count}, torch.device("cpu"))
    if count < 20:
        objective.on_train_epoch_end()  # it may be by chance; a warning would be an error
    else:
        with pytest.warns(UserWarning, match="has taken none of the first 20 samples"):
            objective.on_train_epoch_end()
        objective.on_train_epoch_end()


def test_from_a_cache_as_without(session_shards: Path, tmp_path: Path, trainer_options: dict[str, Any]) -> None:
    """Cached samples keep their keys."""
    found = []
    for cached in (False, True):
        for weight in (1.0, 0.25):
            module = LoraDiffusion(
                StableDiffusion("embedded"),
                LoraConfig(r=2, lora_alpha=2),
                objective=DDPM(prior=PriorPreservation("*[02468]", weight)),
                base_dtype="float32",
                seed=1,
            )
            data = WebDatasetDataModule(
                str(session_shards),
                resolution=16,
                batch_size=4,
                val_samples=4,
                num_workers=0,
                seed=1,
                decoder=ImageDecoder(center_crop=True),
            )
            if cached:
                if not (tmp_path / "cache").exists():
                    cache_shards(module, data, str(tmp_path / "cache"), dtype="float32")
                data.train_shards = str(tmp_path / "cache")
            losses: list[float] = []
            Trainer(**trainer_options, max_steps=2, callbacks=[Losses(losses)]).fit(module, data)
            found.append(losses)
    live, live_less, from_cache, from_cache_less = found
    assert live_less[0] < live[0]
    assert from_cache == pytest.approx(live, abs=1e-4)
    assert from_cache_less == pytest.approx(live_less, abs=1e-4)


class Losses(Callback):
    """Notes the loss of each step."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
