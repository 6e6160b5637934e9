"""Checks that an objective's own loss heeds the masks and weights of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lit_lora.draws import Draws
from lit_lora.errors import UserError

if TYPE_CHECKING:
    from lit_lora.objectives.base import NoisySample, Objective


def check_counting(objective: Objective, latent_shape: Sequence[int], masks: bool) -> None:
    """Check an objective on two samples of random latents, before a base is read.

    Args:
        objective: Objective that has taken the base's noise schedule.
        latent_shape: Shape of the latents of one image.
        masks: Whether batches will have masks.

    Raises:
        UserError: If the loss does not depend on masks, or on weights although there is prior preservation.
    """
    draws, training = Draws(0, range(2)), objective.training
    objective.train()
    try:
        sample = objective.sample(draws.normal("latents", latent_shape), draws)
        if masks:
            sample = sample._replace(mask=sample.latents.new_ones(2, 1, *latent_shape[-2:]))
        check_loss(objective, sample)
    finally:
        objective.train(training)


def check_loss(objective: Objective, sample: NoisySample) -> None:
    """Check that an objective's loss depends on the masks of samples, if they have any, and on weights with prior preservation.

    Args:
        objective: Objective in training mode. Its loss is called up to four times more.
        sample: Samples with all that counts.

    Raises:
        UserError: If it does not.
    """

    def same(first: NoisySample, second: NoisySample) -> bool:
        with torch.no_grad():
            return torch.equal(*(objective.loss(sample.target + 1, one) for one in (first, second)))

    name, weight = f"the loss of {type(objective).__name__}", sample.weight
    end = "end it with self.mean_errors(errors, sample)"
    none, all_ = torch.zeros_like, torch.ones_like
    if (mask := sample.mask) is not None and same(sample._replace(mask=none(mask)), sample._replace(mask=all_(mask))):
        raise UserError(f"{name} ignores the masks of the data (loss_mask); {end}, or train without masks")
    if objective.prior is not None and same(sample._replace(weight=none(weight)), sample._replace(weight=all_(weight))):
        raise UserError(
            f"{name} ignores sample.weight, so that prior preservation has no effect; {end}, or leave prior out"
        )
