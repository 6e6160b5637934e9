"""Min-SNR weighting."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.errors import check_above
from lit_lora.objectives.weightings.snr_weighting import SNRWeighting


@dataclass(frozen=True)
class MinSNR(SNRWeighting):
    r"""Min-SNR weighting (Hang et al., 2023, arXiv 2303.09556), against timesteps with little noise dominating the loss.

    The weight of :math:`x_0` is :math:`min(SNR, \gamma)`; see :class:`SNRWeighting` for other predictions.

    Args:
        gamma: Largest weight, above 0; defaults to 5, as in the paper.

    Raises:
        UserError: If ``gamma`` is not above 0.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_above(0, gamma=self.gamma)

    def of_sample(self, snr: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma)
