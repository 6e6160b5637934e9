"""Soft min-SNR weighting."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.errors import check_above
from lit_lora.objectives.weightings.snr_weighting import SNRWeighting


@dataclass(frozen=True)
class SoftMinSNR(SNRWeighting):
    r"""Soft min-SNR weighting (Crowson et al., 2024, arXiv 2401.11605): min-SNR without its kink.

    The weight of :math:`x_0` is :math:`1 / (1 / SNR + 1 / \gamma) = SNR \gamma / (SNR + \gamma)`; see
    :class:`SNRWeighting` for other predictions.

    Args:
        gamma: Limit of the weight for little noise, above 0; defaults to 4, as in the paper.

    Raises:
        UserError: If ``gamma`` is not above 0.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_above(0, gamma=self.gamma)

    def of_sample(self, snr: Tensor) -> Tensor:
        return snr * self.gamma / (snr + self.gamma)
