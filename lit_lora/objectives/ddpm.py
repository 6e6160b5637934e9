"""Denoising diffusion with prediction of the noise, the velocity or the sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError, check_least
from lit_lora.objectives.base import NoisySample, Objective
from lit_lora.objectives.criteria import Criterion, SquaredError
from lit_lora.objectives.noise_level import NoiseLevel
from lit_lora.objectives.noises import NoiseKind
from lit_lora.objectives.weightings import Weighting

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What the denoiser may predict."""


class DDPM(Objective):
    r"""Denoising diffusion (DDPM, Ho et al., 2020) with the base's own noise schedule.

    For noise :math:`\epsilon` and a uniform timestep :math:`t` the denoiser sees
    :math:`x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon` and predicts :math:`\epsilon`, the velocity
    :math:`\sqrt{\bar\alpha_t} \epsilon - \sqrt{1 - \bar\alpha_t} x_0`, or :math:`x_0`.

    Args:
        prediction_type: Target of the prediction: ``epsilon``, ``v_prediction`` or ``sample``; defaults to that of the base's
            scheduler.
        weighting: Weight of each sample's loss: ``MinSNR``, ``SoftMinSNR``, ``DebiasedEstimation`` or ``P2``; defaults to none.
        criterion: How much an error counts: ``SquaredError``, ``PseudoHuber``, ``SNRPseudoHuber`` or
            ``ExponentialPseudoHuber``; defaults to ``SquaredError``.
        noise: Changes of the noise, one after the other: ``OffsetNoise``, ``PyramidNoise``; defaults to none.
        input_perturbation: Factor of further noise that is added to the denoiser's input but not to its target (Ning et al.,
            2023, arXiv 2301.11706); defaults to 0.

    Raises:
        UserError: If ``input_perturbation`` is below 0, or the weighting has no meaning for the prediction.
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
    ) -> None:
        super().__init__()
        check_least(0, input_perturbation=input_perturbation)
        if weighting is not None:
            weighting.check(PREDICTIONS if prediction_type is None else [prediction_type])
        self.prediction_type = prediction_type
        self.weighting = weighting
        self.criterion = criterion
        self.noise = tuple(noise)
        self.input_perturbation = input_perturbation

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
        self.scheduler = DDPMScheduler.from_config(config)
        predicted: Literal["epsilon", "v_prediction", "sample"] = self.scheduler.config.prediction_type
        self.prediction_type = predicted
        if self.weighting is not None:
            self.weighting.check([predicted])
        if predicted == "epsilon" and self.scheduler.alphas_cumprod[-1] == 0:
            raise UserError(
                "the base's schedule ends in pure noise (rescale_betas_zero_snr), from which epsilon cannot be learned; set "
                "prediction_type to v_prediction"
            )
        return config

    def sample(self, latents: Tensor, draws: Draws, num_tokens: int = 1) -> NoisySample:
        noise = self.draw_noise(latents, draws)
        timesteps = draws.integers("timestep", self.scheduler.config.num_train_timesteps)
        added = noise
        if self.training and self.input_perturbation:
            added = noise + self.input_perturbation * draws.normal("input perturbation", latents.shape[1:])
        noisy = self.scheduler.add_noise(latents, added, timesteps)
        target = self._target(latents, noise, timesteps)
        time = timesteps / self.scheduler.config.num_train_timesteps
        level = NoiseLevel(time, compute_snr(self.scheduler, timesteps))
        return NoisySample(noisy, timesteps, target, self._weight(level), latents, level)

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
