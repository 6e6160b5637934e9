"""Denoising diffusion with prediction of the noise, the velocity or the sample."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.draws import Draws
from lit_lora.errors import UserError, check_least
from lit_lora.objectives.base import NoisySample, Objective, check_timestep_range
from lit_lora.objectives.criteria import Criterion, SquaredError
from lit_lora.objectives.noise_level import NoiseLevel
from lit_lora.objectives.noises import NoiseKind
from lit_lora.objectives.prior_preservation import PriorPreservation
from lit_lora.objectives.weightings import SNRWeighting, Weighting

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What the denoiser may predict."""

_NO_EPSILON = "epsilon cannot be learned from pure noise: set prediction_type to v_prediction"


class DDPM(Objective):
    r"""Denoising diffusion (DDPM, Ho et al., 2020) with the base's own noise schedule.

    For noise :math:`\epsilon` and a uniform timestep :math:`t` the denoiser sees
    :math:`x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon` and predicts :math:`\epsilon`, the velocity
    :math:`\sqrt{\bar\alpha_t} \epsilon - \sqrt{1 - \bar\alpha_t} x_0`, or :math:`x_0`.

    Args:
        prediction_type: Target of the prediction: ``epsilon``, ``v_prediction`` or ``sample``; defaults to that of the base's
            scheduler.
        weighting: Weight of each sample's loss: ``MinSNR``, ``SoftMinSNR``, ``DebiasedEstimation`` or ``P2``; defaults to none.
        criterion: Loss function: ``SquaredError``, ``PseudoHuber``, ``SNRPseudoHuber`` or ``ExponentialPseudoHuber``;
            defaults to ``SquaredError``.
        noise: Changes of the noise, applied in order: ``OffsetNoise``, ``PyramidNoise``; defaults to none.
        input_perturbation: Factor of further noise that is added to the denoiser's input but not to its target (Ning et al.,
            2023, arXiv 2301.11706); defaults to 0.
        timestep_range: First and last timestep to train, as fractions of the schedule: 0 is no noise, 1 pure noise. For an
            expert, or to train details (low) or composition (high) alone. Defaults to all, (0, 1).
        zero_terminal_snr: Change the noise schedule so that it ends in pure noise (Lin et al., 2023, arXiv 2305.08891), for very
            dark and very bright images. Training, and sampling here, then use diffusers' ``rescale_betas_zero_snr`` and
            trailing timesteps; set ``sampling.guidance_rescale`` to 0.7 with it. It excludes the prediction type
            ``epsilon``, which cannot be learned from pure noise. Off by default.
        prior: Prior preservation (:class:`PriorPreservation`): which samples are class images, and the weight of their loss.
            Defaults to none.

    Raises:
        UserError: If ``input_perturbation`` is below 0, the weighting has no meaning for the prediction, ``timestep_range`` is
            not a part of [0, 1], or ``zero_terminal_snr`` meets the prediction of epsilon.
    """

    schedulers: ClassVar[tuple[str, ...]] = (
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    )

    def __init__(
        self,
        prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None,
        weighting: Weighting | None = None,
        criterion: Criterion = SquaredError(),  # noqa: B008 it is frozen
        noise: Sequence[NoiseKind] = (),
        input_perturbation: float = 0.0,
        timestep_range: tuple[float, float] = (0.0, 1.0),
        zero_terminal_snr: bool = False,
        prior: PriorPreservation | None = None,
    ) -> None:
        check_types(DDPM, locals())
        super().__init__()
        check_least(0, input_perturbation=input_perturbation)
        check_timestep_range(*timestep_range)
        if zero_terminal_snr and prediction_type == "epsilon":
            raise UserError(f"zero_terminal_snr is on, and {_NO_EPSILON}")
        if weighting is not None:
            weighting.check(PREDICTIONS if prediction_type is None else [prediction_type])
        self.prediction_type = prediction_type
        self.weighting = weighting
        self.criterion = criterion
        self.noise = tuple(noise)
        self.input_perturbation = input_perturbation
        self.timestep_range = timestep_range
        self.zero_terminal_snr = zero_terminal_snr
        self.prior = prior

    def set_schedule(self, config: dict[str, Any]) -> dict[str, Any]:
        if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
            raise UserError(
                f"the {config['_class_name']} is configured for flow matching (prediction_type "
                f"{config.get('prediction_type')!r}, use_flow_sigmas {config.get('use_flow_sigmas', False)})"
            )
        if config.get("timestep_type", "discrete") != "discrete":
            raise UserError(
                f"the {config['_class_name']} has timestep_type {config['timestep_type']!r}, not 'discrete'"
            )
        if self.prediction_type is not None:
            config["prediction_type"] = self.prediction_type
        if self.zero_terminal_snr:
            config |= _ends_in_noise(config["_class_name"])
        self.scheduler = DDPMScheduler.from_config(config)
        predicted: Literal["epsilon", "v_prediction", "sample"] = self.scheduler.config.prediction_type
        self.prediction_type = predicted
        if self.weighting is not None:
            self.weighting.check([predicted])
        ends_in_noise = bool(self.scheduler.alphas_cumprod[-1] == 0)
        if predicted == "epsilon" and ends_in_noise:
            raise UserError(f"the schedule ends in pure noise (rescale_betas_zero_snr), and {_NO_EPSILON}")
        if ends_in_noise and isinstance(self.weighting, SNRWeighting):
            warnings.warn(
                f"{type(self.weighting).__name__} gives pure noise, in which the schedule ends, the weight 0, so its timestep is "
                f"not trained; without a weighting it is",
                stacklevel=2,
            )
        self._timesteps = self._trained_timesteps(int(self.scheduler.config.num_train_timesteps))
        return config

    def sample(self, latents: Tensor, draws: Draws, num_tokens: int = 1) -> NoisySample:
        noise = self.draw_noise(latents, draws)
        steps = self._timesteps if self.training else range(self.scheduler.config.num_train_timesteps)
        timesteps = steps.start + draws.integers("timestep", len(steps))
        added = noise
        if self.training and self.input_perturbation:
            added = noise + self.input_perturbation * draws.normal("input perturbation", latents.shape[1:])
        noisy = self.scheduler.add_noise(latents, added, timesteps)
        target = self._target(latents, noise, timesteps)
        time = timesteps / self.scheduler.config.num_train_timesteps
        level = NoiseLevel(time, compute_snr(self.scheduler, timesteps))
        return NoisySample(noisy, timesteps, target, self._weight(level), latents, level)

    def _trained_timesteps(self, count: int) -> range:
        low, high = (round(end * count) for end in self.timestep_range)
        if low == high:
            raise UserError(
                f"timestep_range={list(self.timestep_range)} holds none of the base's {count} timesteps; make it wider"
            )
        return range(low, high)

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return latents

    def _weight(self, level: NoiseLevel) -> Tensor:
        if self.weighting is None or not self.training:
            return torch.ones_like(level.time)
        assert self.prediction_type is not None, "call prepare first"
        return self.weighting.weights(level, self.prediction_type)


def _ends_in_noise(scheduler: str) -> dict[str, Any]:
    """Changes of a scheduler's config for a schedule that ends in pure noise, with another scheduler if it has none.

    Args:
        scheduler: Class name of the base's scheduler.
    """
    changes: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, scheduler)).parameters:
        return changes
    # DDIM, as in the paper. It clips by default, which is for pixels.
    return changes | {"_class_name": "DDIMScheduler", "clip_sample": False}
