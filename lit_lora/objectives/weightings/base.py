"""The interface of a weighting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.objectives.noise_level import NoiseLevel


class Weighting(ABC):
    """Weights of the samples' losses by their noise levels; objectives apply them in training only."""

    # A property, since jsonargparse cannot read the options of a dataclass that has a ClassVar.
    @property
    @abstractmethod
    def predictions(self) -> tuple[str, ...]:
        """What the denoiser may predict for the weights to have a meaning: ``epsilon``, ``v_prediction``, ``sample`` or
        ``flow_prediction``, as in diffusers' schedulers.
        """

    @abstractmethod
    def weights(self, level: NoiseLevel, prediction_type: str) -> Tensor:
        """Weight of each sample's mean squared error, float32 ``(B,)``.

        Args:
            level: Noise levels of the samples.
            prediction_type: What the denoiser predicts, one of :attr:`predictions`.
        """

    def check(self, predictions: Sequence[str]) -> None:
        """Check that the weights have a meaning for at least one kind of prediction.

        Raises:
            UserError: If they have none.
        """
        if not set(predictions) & set(self.predictions):
            raise UserError(
                f"{type(self).__name__} weights the errors of {_listed(self.predictions)}, and this model predicts "
                f"{_listed(predictions)}; choose another weighting, or null for none"
            )


def _listed(names: Sequence[str]) -> str:
    return " or ".join(names)
