"""Contrastive flow matching against its formula."""

from __future__ import annotations

import pytest
import torch

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.objectives import Contrast, FlowMatching, NoisySample


def noisy(objective: FlowMatching, count: int) -> tuple[NoisySample, torch.Tensor]:
    objective.prepare({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 2, 2, generator=generator)
    return objective.sample(latents, Draws(0, range(count))), torch.randn(latents.shape, generator=generator)


def test_the_formula() -> None:
    objective = FlowMatching(contrast=Contrast(0.2))
    sample, prediction = noisy(objective, 3)
    losses = objective.loss(prediction, sample)
    for place in range(3):
        own, other = sample.target[place], sample.target[place - 1]
        expected = ((prediction[place] - own) ** 2).mean() - 0.2 * ((prediction[place] - other) ** 2).mean()
        torch.testing.assert_close(losses[place], expected)


def test_only_in_training() -> None:
    plain, objective = FlowMatching().eval(), FlowMatching(contrast=Contrast()).eval()
    sample, prediction = noisy(objective, 2)
    assert torch.equal(objective.loss(prediction, sample), plain.loss(prediction, sample))


def test_a_batch_of_one() -> None:
    objective = FlowMatching(contrast=Contrast())
    sample, prediction = noisy(objective, 1)
    with pytest.raises(UserError, match="there is only 1; set batch_size to at least 2"):
        objective.loss(prediction, sample)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weights_out_of_range(weight: float) -> None:
    with pytest.raises(UserError, match=f"weight={weight} of Contrast must lie between 0 and 1"):
        Contrast(weight)
