"""Flow matching: prediction of the velocity on straight paths from data to noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.objectives.base import NoisySample, Objective, check_timestep_range
from lit_lora.objectives.contrast import Contrast
from lit_lora.objectives.criteria import Criterion, SquaredError
from lit_lora.objectives.densities import LogitNormal, TimestepDensity, Uniform
from lit_lora.objectives.noise_level import NoiseLevel
from lit_lora.objectives.noises import NoiseKind
from lit_lora.objectives.prior_preservation import PriorPreservation
from lit_lora.objectives.weightings import Weighting

PREDICTION = "flow_prediction"
"""diffusers' name of what the denoiser predicts."""


class FlowMatching(Objective):
    r"""Rectified flow (Liu et al., 2022; Lipman et al., 2022) as trained by Esser et al., 2024 (arXiv 2403.03206).

    For noise :math:`\epsilon` and a noise level :math:`\sigma` in (0, 1] the denoiser sees
    :math:`(1 - \sigma) x_0 + \sigma \epsilon` at the timestep :math:`1000 \sigma` and predicts the velocity
    :math:`\epsilon - x_0`. The density draws a time :math:`t`, which is rounded to one of the scheduler's
    ``num_train_timesteps`` and shifted towards noise: :math:`\sigma = s t / (1 + (s - 1) t)`.

    The shift :math:`s` comes from the base's scheduler config. It is constant (``shift``) or depends on resolution
    (``use_dynamic_shifting``); then :math:`\mu` grows linearly with the number of tokens from ``base_shift`` at
    ``base_image_seq_len`` to ``max_shift`` at ``max_image_seq_len``, and :math:`s = e^\mu` (or :math:`\mu`, with
    ``time_shift_type: linear``).

    In evaluation mode times are uniform on the whole range, without shift, and losses are not weighted.

    Args:
        density: Density of the times: ``LogitNormal``, ``Uniform``, ``Mode`` or ``CosMap``; defaults to ``LogitNormal``.
        shift: Constant shift, above 0; 1 is no shift. Defaults to the shift of the base's scheduler.
        weighting: Weight of each sample's loss: ``SigmaSqrt`` or ``CosMapWeighting``; defaults to none.
        precondition_outputs: Measure the error of the latents that follow from the predicted velocity,
            :math:`x_\sigma - \sigma v`, instead of the error of the velocity: the loss is multiplied by :math:`\sigma^2`.
            Off by default; on in some of diffusers' scripts.
        criterion: Loss function: ``SquaredError``, ``PseudoHuber``, ``SNRPseudoHuber`` or ``ExponentialPseudoHuber``;
            defaults to ``SquaredError``.
        noise: Changes of the noise, applied in order: ``OffsetNoise``, ``PyramidNoise``; defaults to none. Flow matching
            learns to start from plain noise and needs them less than denoising diffusion.
        timestep_range: Lowest and highest noise level :math:`\sigma` to train, to which the shifted levels are scaled. For
            an expert, or to train details (low) or composition (high) alone. Defaults to all, (0, 1).
        contrast: Contrastive term (:class:`Contrast`), which drives the predictions for different samples apart and needs
            batches of at least two samples. Defaults to none.
        prior: Prior preservation (:class:`PriorPreservation`): which samples are class images, and the weight of their loss.
            Defaults to none.

    Raises:
        UserError: If ``shift`` is not above 0, the weighting has no meaning for flow matching, or ``timestep_range`` is not a
            part of [0, 1].
    """

    schedulers: ClassVar[tuple[str, ...]] = (
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    )

    def __init__(
        self,
        density: TimestepDensity = LogitNormal(),  # noqa: B008 it is frozen
        shift: float | None = None,
        weighting: Weighting | None = None,
        precondition_outputs: bool = False,
        criterion: Criterion = SquaredError(),  # noqa: B008 it is frozen
        noise: Sequence[NoiseKind] = (),
        timestep_range: tuple[float, float] = (0.0, 1.0),
        contrast: Contrast | None = None,
        prior: PriorPreservation | None = None,
    ) -> None:
        check_types(FlowMatching, locals())
        super().__init__()
        if shift is not None and not shift > 0:
            raise UserError(f"shift={shift} is too small; it must be above 0: 1 for no shift, null for the base's own")
        check_timestep_range(*timestep_range)
        if weighting is not None:
            weighting.check([PREDICTION])
        self.density = density
        self.shift = shift
        self.weighting = weighting
        self.precondition_outputs = precondition_outputs
        self.criterion = criterion
        self.noise = tuple(noise)
        self.timestep_range = timestep_range
        self.contrast = contrast
        self.prior = prior

    def set_schedule(self, config: dict[str, Any]) -> dict[str, Any]:
        if config.get("invert_sigmas"):
            raise UserError("the scheduler has invert_sigmas, which measures time from the noise and is not supported")
        if not config["_class_name"].startswith("FlowMatch") and not config.get("use_flow_sigmas"):
            raise UserError(
                f"the {config['_class_name']} is not configured for flow matching (use_flow_sigmas is not true)"
            )
        self.scheduler_config = config
        self.num_train_timesteps = int(config.get("num_train_timesteps", 1000))
        return config

    def sample(self, latents: Tensor, draws: Draws, num_tokens: int = 1) -> NoisySample:
        noise = self.draw_noise(latents, draws)
        if self.training:
            low, high = self.timestep_range
            sigma = low + (high - low) * self._shifted(self._rounded(self.density.times(draws)), num_tokens)
        else:
            sigma = self._rounded(Uniform().times(draws))
        share = sigma.view(-1, *[1] * (latents.ndim - 1))
        noisy = (1 - share) * latents + share * noise
        level = NoiseLevel(sigma, ((1 - sigma) / sigma) ** 2)
        timesteps = sigma * self.num_train_timesteps
        return NoisySample(noisy, timesteps, noise - latents, self._weight(level), latents, level)

    def errors(self, prediction: Tensor, target: Tensor, level: NoiseLevel) -> Tensor:
        errors = super().errors(prediction, target, level)
        if self.contrast is None or not self.training:
            return errors
        return errors - self.contrast.errors(prediction, target)

    def shift_for(self, num_tokens: int) -> float:
        """The shift for images of this many tokens."""
        config = self.scheduler_config
        if self.shift is not None:
            return self.shift
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", config.get("flow_shift", 1.0)))
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = least + (most - least) * (num_tokens - low) / (high - low)
        return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)

    def _rounded(self, times: Tensor) -> Tensor:
        """Noise levels of the scheduler's own timesteps, in (0, 1]."""
        steps = self.num_train_timesteps
        from_noise = ((1 - times) * steps).long().clamp(max=steps - 1)
        return (steps - from_noise) / steps

    def _shifted(self, sigma: Tensor, num_tokens: int) -> Tensor:
        shift = self.shift_for(num_tokens)
        return shift * sigma / (1 + (shift - 1) * sigma)

    def _weight(self, level: NoiseLevel) -> Tensor:
        if not self.training:
            return torch.ones_like(level.time)
        weight = torch.ones_like(level.time)
        if self.weighting is not None:
            weight = self.weighting.weights(level, PREDICTION)
        return weight * level.time**2 if self.precondition_outputs else weight
