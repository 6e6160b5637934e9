"""A custom objective and a custom density of times.

With this file on PYTHONPATH, a config names the objective:

    model:
      objective:
        class_path: my_objective.P2Noise
        init_args: {gamma: 0.5}

and the density:

    model:
      objective:
        class_path: FlowMatching
        init_args:
          density: {class_path: my_objective.Triangular}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from lit_lora import Objective, TimestepDensity, UserError
from lit_lora.draws import Draws
from lit_lora.objectives import NoiseLevel, NoisySample


class P2Noise(Objective):
    r"""Noise prediction with P2 weighting (Choi et al. 2022) and a Huber loss.

    The denoiser sees ``sqrt(a) x + sqrt(1 - a) e`` for noise ``e`` and the schedule's cumulative product ``a`` at a uniformly
    drawn timestep, and predicts ``e``. The loss of a sample is weighted by ``(1 + a / (1 - a)) ** -gamma``, less where little
    noise was added; in evaluation mode by 1.

    Args:
        gamma: Exponent of the weight, at least 0; defaults to 1. With 0 all timesteps have the same weight.
        delta: Errors above this count linearly, above 0; defaults to 1.

    Raises:
        UserError: If ``gamma`` or ``delta`` is outside its range.
    """

    schedulers: ClassVar[tuple[str, ...]] = (
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
    )

    cumulative: Tensor
    """Cumulative products of the schedule, float32 ``(num_train_timesteps,)``."""

    def __init__(self, gamma: float = 1.0, delta: float = 1.0) -> None:
        super().__init__()
        if gamma < 0:
            raise UserError(f"P2Noise: gamma={gamma} must be at least 0; 0 turns the weighting off")
        if delta <= 0:
            raise UserError(f"P2Noise: delta={delta} must be above 0; 1 is the usual value")
        self.gamma = gamma
        self.delta = delta

    def set_schedule(self, config: dict[str, Any]) -> dict[str, Any]:
        predicted = config.get("prediction_type", "epsilon")
        if predicted != "epsilon":
            raise UserError(
                f"P2Noise trains models that predict noise; the scheduler says prediction_type={predicted!r}"
            )
        # A buffer moves to the device with the module; it is not saved, since the base has the schedule.
        self.register_buffer("cumulative", DDPMScheduler.from_config(config).alphas_cumprod, persistent=False)
        return config

    def sample(self, latents: Tensor, draws: Draws, num_tokens: int = 1) -> NoisySample:
        noise = draws.normal("noise", latents.shape[1:])
        timesteps = draws.integers("timestep", len(self.cumulative))
        kept = self.cumulative[timesteps]
        level = kept.view(-1, *[1] * (latents.ndim - 1))
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        weight = (1 + kept / (1 - kept)) ** -self.gamma if self.training else torch.ones_like(kept)
        snr = NoiseLevel(timesteps / len(self.cumulative), kept / (1 - kept))
        return NoisySample(noisy, timesteps, target=noise, weight=weight, latents=latents, level=snr)

    def loss(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        errors = F.huber_loss(prediction.float(), sample.target.float(), reduction="none", delta=self.delta)
        return self.mean_errors(errors, sample)


@dataclass(frozen=True)
class Triangular(TimestepDensity):
    """The mean of two uniform values: most times are near 1/2, none are at the ends."""

    def times(self, draws: Draws) -> Tensor:
        # Two draws under the same name would be the same numbers.
        return (draws.uniform("timestep") + draws.uniform("second timestep")) / 2
