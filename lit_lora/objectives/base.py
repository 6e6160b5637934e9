"""What an objective is: what is drawn for a training step and what the loss is. It knows no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lit_lora.draws import Draws
from lit_lora.errors import UserError


class NoisySample(NamedTuple):
    """What an objective makes of the latents of ``B`` samples."""

    noisy: Tensor
    """The denoiser's input, float32 ``(B, *latent_shape)``."""
    timesteps: Tensor
    """int64 or float32 ``(B,)``, in the units of the base's scheduler: 0 for data, ``num_train_timesteps`` for noise."""
    target: Tensor
    """What the denoiser should predict, ``(B, *latent_shape)``."""
    weight: Tensor
    """Weight of each sample's loss, float32 ``(B,)``."""
    latents: Tensor
    """The latents without noise, ``(B, *latent_shape)``."""


class Objective(nn.Module, ABC):
    """A training objective; in training mode as configured, in evaluation mode in its plain form.

    The plain form has no weighting, offset or perturbation, so that validation losses of runs with different settings
    compare.
    """

    schedulers: ClassVar[tuple[str, ...]]
    """Class names of the diffusers schedulers whose models the objective can train."""

    def prepare(self, scheduler_config: dict[str, Any]) -> dict[str, Any]:
        """Take the noise schedule of the base; return the scheduler config to sample with.

        Args:
            scheduler_config: As in the base's ``scheduler_config.json``.

        Raises:
            UserError: If the objective cannot train a model of this scheduler, or the schedule and the objective's settings
                contradict each other.
        """
        name = scheduler_config.get("_class_name")
        if name not in self.schedulers:
            raise UserError(f"the scheduler is {name}; {type(self).__name__} takes {', '.join(self.schedulers)}")
        return self.set_schedule(scheduler_config.copy())

    @abstractmethod
    def set_schedule(self, config: dict[str, Any]) -> dict[str, Any]:
        """Take the noise schedule of a scheduler in :attr:`schedulers`; return the scheduler config to sample with.

        Raises:
            UserError: If the schedule and the objective's settings contradict each other.
        """

    @abstractmethod
    def sample(self, latents: Tensor, draws: Draws, num_tokens: int = 1) -> NoisySample:
        """Draw timesteps and noise.

        Args:
            latents: float32 ``(B, *latent_shape)``.
            draws: The random numbers of the batch.
            num_tokens: Tokens that the denoiser makes of the latents of one sample, for schedules that depend on the
                resolution.
        """

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Weighted mean squared error of each sample, float32 ``(B,)``.

        Args:
            prediction: What the denoiser gave for ``sample.noisy``, ``(B, *latent_shape)``.
            sample: What :meth:`sample` gave.
        """
        errors = F.mse_loss(prediction.float(), sample.target.float(), reduction="none")
        return errors.flatten(1).mean(1) * sample.weight
