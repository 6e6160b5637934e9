"""The interface of an objective: noisy samples, targets and the loss, independent of any model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.objectives.counting import check_loss
from lit_lora.objectives.criteria import Criterion, SquaredError
from lit_lora.objectives.masked import masked
from lit_lora.objectives.noise_level import NoiseLevel
from lit_lora.objectives.noises import NoiseKind
from lit_lora.objectives.prior_preservation import PriorPreservation


class NoisySample(NamedTuple):
    """The latents of ``B`` samples with noise, and what the denoiser should predict for them."""

    noisy: Tensor
    """Input of the denoiser, float32 ``(B, *latent_shape)``."""
    timesteps: Tensor
    """Timesteps from 0 for data to ``num_train_timesteps`` of the base's scheduler for noise, int64 or float32 ``(B,)``."""
    target: Tensor
    """Target of the denoiser's prediction, ``(B, *latent_shape)``."""
    weight: Tensor
    """Weight of each sample's loss, float32 ``(B,)``."""
    latents: Tensor
    """Latents without noise, ``(B, *latent_shape)``."""
    level: NoiseLevel
    """Noise levels, on which criteria and weightings may depend."""
    mask: Tensor | None = None
    """How much each pixel of the latents counts in training, float32 in [0, 1], ``(B, 1, h, w)``; None if all do."""


def check_timestep_range(low: float, high: float) -> None:
    """Check the part of the timesteps that an objective trains.

    Raises:
        UserError: If it is not a part of [0, 1].
    """
    if not 0 <= low < high <= 1:
        raise UserError(
            f"timestep_range=[{low}, {high}] must be a part of [0, 1], the smaller number first: 0 is data and 1 noise, as "
            f"[0.0, 0.5] for the half with less noise"
        )


class Objective(nn.Module, ABC):
    """A training objective: the distribution of noisy samples, their targets and the loss.

    In evaluation mode there is no weighting, mask, offset or perturbation, timesteps come from their whole range, and the
    criterion is the squared error, so that validation losses of runs with different settings can be compared.
    """

    criterion: Criterion = SquaredError()
    """How much an error of the prediction counts in training."""
    noise: Sequence[NoiseKind] = ()
    """Changes of the noise in training, one after the other."""
    prior: PriorPreservation | None = None
    """Which samples are class images, and how much they count in training."""
    _heeds_masks = False
    """Whether the loss was seen to depend on masks."""
    schedulers: ClassVar[tuple[str, ...]]
    """Class names of the diffusers schedulers whose models the objective can train."""

    def prepare(self, scheduler_config: dict[str, Any]) -> dict[str, Any]:
        """Take the noise schedule of the base; return the scheduler config to sample with.

        Args:
            scheduler_config: Contents of the base's ``scheduler_config.json``.

        Raises:
            UserError: If the objective cannot train models of this scheduler, or the schedule contradicts the objective's
                settings.
        """
        name = scheduler_config.get("_class_name")
        if name not in self.schedulers:
            raise UserError(f"the scheduler is {name}, and {type(self).__name__} supports {', '.join(self.schedulers)}")
        return self.set_schedule(scheduler_config.copy())

    @abstractmethod
    def set_schedule(self, config: dict[str, Any]) -> dict[str, Any]:
        """Take the noise schedule of a scheduler in :attr:`schedulers`; return the scheduler config to sample with.

        Args:
            config: Contents of the base's ``scheduler_config.json``.

        Raises:
            UserError: If the schedule contradicts the objective's settings.
        """

    @abstractmethod
    def sample(self, latents: Tensor, draws: Draws, num_tokens: int = 1) -> NoisySample:
        """Draw timesteps and noise for a batch of latents.

        Args:
            latents: Normalized latents, float32 ``(B, *latent_shape)``.
            draws: Random numbers of the batch.
            num_tokens: Number of tokens that the denoiser makes of one sample's latents, for schedules that depend on
                resolution; defaults to 1.
        """

    def draw_noise(self, latents: Tensor, draws: Draws) -> Tensor:
        """Draw the noise of a batch: standard normal, in training changed by :attr:`noise`; float32 ``(B, *latent_shape)``.

        Args:
            latents: Latents, ``(B, *latent_shape)``.
            draws: Random numbers of the batch.
        """
        noise = draws.normal("noise", latents.shape[1:])
        for kind in self.noise if self.training else ():
            noise = kind.apply(noise, draws)
        return noise

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Weighted mean error of each sample by the criterion, float32 ``(B,)``.

        Args:
            prediction: Prediction of the denoiser for ``sample.noisy``, ``(B, *latent_shape)``.
            sample: Result of :meth:`sample`.
        """
        return self.mean_errors(self.errors(prediction.float(), sample.target.float(), sample.level), sample)

    def errors(self, prediction: Tensor, target: Tensor, level: NoiseLevel) -> Tensor:
        """Error of each element, in training by the criterion, float32 ``(B, *latent_shape)``.

        Args:
            prediction: Prediction of the denoiser, float32 ``(B, *latent_shape)``.
            target: Its target, float32 ``(B, *latent_shape)``.
            level: Noise levels of the samples.
        """
        criterion = self.criterion if self.training else SquaredError()
        return criterion.errors(prediction - target, level)

    def counted(self, sample: NoisySample, batch: Mapping[str, Any]) -> NoisySample:
        """The noisy samples with what the batch says about how they count in training: their masks, and which are class images.

        Args:
            sample: Result of :meth:`sample` for the batch.
            batch: Batch: see :data:`lit_lora.families.Batch`.

        Raises:
            UserError: If :attr:`prior` cannot tell class images, or the :meth:`loss` of a subclass ignores the masks.
        """
        sample = masked(sample, batch)
        if not self.training:
            return sample
        if sample.mask is not None and not self._heeds_masks:
            check_loss(self, sample)
            self._heeds_masks = True
        if self.prior is None:
            return sample
        return sample._replace(weight=sample.weight * self.prior.weights(batch, sample.weight.device))

    def on_train_epoch_end(self) -> None:
        """Warn if :attr:`prior` has met images of one kind alone; the module calls it."""
        if self.prior is not None:
            self.prior.warn_of_one_kind()

    def mean_errors(self, errors: Tensor, sample: NoisySample) -> Tensor:
        """Mean of each sample's errors, in training masked, times its weight; float32 ``(B,)``.

        The mean is over all pixels, also masked ones, so that a pixel counts the same in each sample.

        Args:
            errors: Error of each element, float32 ``(B, *latent_shape)``.
            sample: Result of :meth:`sample`.
        """
        if sample.mask is not None and self.training:
            errors = errors * sample.mask
        return errors.flatten(1).mean(1) * sample.weight
