"""What an objective is: what is drawn for a training step and what the loss is. It knows no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lit_lora.draws import Draws


class NoisySample(NamedTuple):
    """What an objective gives for a batch of ``B`` latents."""

    noisy: Tensor
    """The denoiser's input, ``(B, C, h, w)``."""
    timesteps: Tensor
    """``(B,)``."""
    target: Tensor
    """What the denoiser should predict, ``(B, C, h, w)``."""
    weight: Tensor
    """Weight of each sample's loss, float32 ``(B,)``."""


class Objective(nn.Module, ABC):
    """In training mode the objective as configured; in evaluation mode its plain form.

    The plain form has no weighting, offset or perturbation, so that validation losses of runs with different settings
    compare.
    """

    @abstractmethod
    def prepare(self, scheduler_config: dict[str, Any]) -> dict[str, Any]:
        """Take the noise schedule of the base; return the scheduler config to sample with.

        Raises:
            UserError: The schedule and the objective's settings contradict each other.
        """

    @abstractmethod
    def sample(self, latents: Tensor, draws: Draws) -> NoisySample:
        """Draw noise and timesteps for ``latents``, ``(B, C, h, w)``."""

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean squared error of each sample, float32 ``(B,)``."""
        return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1) * weight
