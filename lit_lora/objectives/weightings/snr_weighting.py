"""Weightings that are functions of the signal-to-noise ratio alone."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from lit_lora.objectives.noise_level import NoiseLevel
from lit_lora.objectives.weightings.base import Weighting


class SNRWeighting(Weighting):
    r"""Weights that count the same error of the latents equally, whatever the denoiser predicts.

    A subclass gives the weight :math:`w` of the squared error of :math:`x_0`. An error of :math:`x_0` squared is one of
    :math:`\epsilon` squared divided by :math:`SNR`, and one of the velocity squared divided by
    :math:`SNR + 1` (Salimans and Ho, 2022, arXiv 2202.00512, appendix D), so these have the weights
    :math:`w / SNR` and :math:`w / (SNR + 1)`.
    """

    @property
    def predictions(self) -> tuple[str, ...]:
        return ("epsilon", "v_prediction", "sample")

    @abstractmethod
    def of_sample(self, snr: Tensor) -> Tensor:
        """Weight of the squared error of the latents without noise, float32 ``(B,)``.

        Args:
            snr: Signal-to-noise ratios, float32 ``(B,)``.
        """

    def weights(self, level: NoiseLevel, prediction_type: str) -> Tensor:
        weight = self.of_sample(level.snr)
        if prediction_type == "epsilon":
            return weight / level.snr
        return weight / (level.snr + 1) if prediction_type == "v_prediction" else weight
