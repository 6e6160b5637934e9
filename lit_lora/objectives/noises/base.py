"""The interface of a kind of noise."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lit_lora.draws import Draws


class NoiseKind(ABC):
    """A change of the standard normal noise that is added to the latents; objectives apply it in training only."""

    @abstractmethod
    def apply(self, noise: Tensor, draws: Draws) -> Tensor:
        """The changed noise, float32 ``(B, C, h, w)``.

        Args:
            noise: Noise, float32 ``(B, C, h, w)``.
            draws: Random numbers of the batch.
        """
