"""The interface of a criterion."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lit_lora.objectives.noise_level import NoiseLevel


class Criterion(ABC):
    """How much an error of the prediction counts; objectives use it in training, and the squared error in evaluation."""

    @abstractmethod
    def errors(self, difference: Tensor, level: NoiseLevel) -> Tensor:
        """The error of each element, float32 ``(B, *latent_shape)``, of which the loss is the mean.

        Args:
            difference: Prediction minus target, float32 ``(B, *latent_shape)``.
            level: Noise levels of the samples.
        """
