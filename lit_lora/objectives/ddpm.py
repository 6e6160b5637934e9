"""Denoising diffusion with prediction of the noise, the velocity or the sample."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError, check_least
from lit_lora.objectives.base import NoisySample, Objective


class DDPM(Objective):
    r"""Denoising diffusion (DDPM, Ho et al., 2020) with the base's own noise schedule.

    For noise :math:`\epsilon` and a uniform timestep :math:`t` the denoiser sees
    :math:`x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon` and predicts :math:`\epsilon`, the velocity
    :math:`\sqrt{\bar\alpha_t} \epsilon - \sqrt{1 - \bar\alpha_t} x_0`, or :math:`x_0`.

    Args:
        prediction_type: Target of the prediction: ``epsilon``, ``v_prediction`` or ``sample``; defaults to that of the base's
            scheduler.
        snr_gamma: Gamma of min-SNR weighting (Hang et al., 2023), usually 5; defaults to no weighting.
        noise_offset: Factor of a standard normal value per sample and channel that is added to the noise; defaults to 0.
        input_perturbation: Factor of further noise that is added to the denoiser's input but not to its target (Ning et al.,
            2023); defaults to 0.

    Raises:
        UserError: If ``snr_gamma`` is not above 0, or ``noise_offset`` or ``input_perturbation`` is below 0.
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
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
    ) -> None:
        super().__init__()
        if snr_gamma is not None and snr_gamma <= 0:
            raise UserError(f"snr_gamma={snr_gamma} is too small; it must be above 0, or null for no weighting")
        check_least(0, noise_offset=noise_offset, input_perturbation=input_perturbation)
        self.prediction_type = prediction_type
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
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
        self.prediction_type = self.scheduler.config.prediction_type
        if self.prediction_type == "epsilon" and self.scheduler.alphas_cumprod[-1] == 0:
            raise UserError(
                "the base's schedule ends in pure noise (rescale_betas_zero_snr), from which epsilon cannot be learned; set "
                "prediction_type to v_prediction"
            )
        return config

    def sample(self, latents: Tensor, draws: Draws, num_tokens: int = 1) -> NoisySample:
        noise = draws.normal("noise", latents.shape[1:])
        if self.training and self.noise_offset:
            noise = noise + self.noise_offset * draws.normal(
                "noise offset", (latents.shape[1], *[1] * (latents.ndim - 2))
            )
        timesteps = draws.integers("timestep", self.scheduler.config.num_train_timesteps)
        added = noise
        if self.training and self.input_perturbation:
            added = noise + self.input_perturbation * draws.normal("input perturbation", latents.shape[1:])
        noisy = self.scheduler.add_noise(latents, added, timesteps)
        target = self._target(latents, noise, timesteps)
        return NoisySample(noisy, timesteps, target, self._weight(timesteps), latents)

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return latents

    def _weight(self, timesteps: Tensor) -> Tensor:
        """Min-SNR weights: min(SNR, gamma) divided by SNR for epsilon, by SNR + 1 for v, by 1 for the sample."""
        if self.snr_gamma is None or not self.training:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.prediction_type == "epsilon":
            return clipped / snr
        if self.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        return clipped
