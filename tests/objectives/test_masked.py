from __future__ import annotations

import torch

from lit_lora.draws import Draws
from lit_lora.objectives import FlowMatching, SigmaSqrt, masked

LATENTS = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def test_only_what_the_mask_keeps_counts_in_training() -> None:
    objective = FlowMatching(weighting=SigmaSqrt())
    objective.prepare(SCHEDULER)
    sample = objective.sample(LATENTS, Draws(0, range(2)))
    prediction = torch.zeros_like(LATENTS)
    mask = torch.zeros(2, 1, 32, 48, dtype=torch.uint8)
    mask[:, :, :16, :20] = 255  # two rows, and two and a half columns, of latents
    ours = objective.loss(prediction, masked(sample, {"loss_mask": mask}))
    squares = (prediction - sample.target) ** 2
    kept = squares[:, :, :2, :2].sum(dim=(1, 2, 3)) + squares[:, :, :2, 2].sum(dim=(1, 2)) / 2
    torch.testing.assert_close(ours, sample.weight * kept / (4 * 4 * 6))
    assert masked(sample, {"caption": ["a", "b"]}) is sample
    # Validation does not mask.
    objective.eval()
    assert torch.equal(
        objective.loss(prediction, masked(sample, {"loss_mask": mask})), objective.loss(prediction, sample)
    )
