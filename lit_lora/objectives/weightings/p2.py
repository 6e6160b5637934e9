"""P2 weighting."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.errors import check_above, check_least
from lit_lora.objectives.weightings.snr_weighting import SNRWeighting


@dataclass(frozen=True)
class P2(SNRWeighting):
    r"""Perception prioritized weighting (P2; Choi et al., 2022, arXiv 2204.00227): less weight where little noise is left.

    The weight of :math:`\epsilon` is :math:`1 / (k + SNR)^\gamma`; see :class:`SNRWeighting` for other predictions.

    Args:
        gamma: Strength, at least 0; 0 weights all timesteps equally. Defaults to 1.
        k: Bound of the weights for pure noise, above 0; defaults to 1.

    Raises:
        UserError: If ``gamma`` is below 0, or ``k`` is not above 0.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_least(0, gamma=self.gamma)
        check_above(0, k=self.k)

    def of_sample(self, snr: Tensor) -> Tensor:
        return snr / (self.k + snr) ** self.gamma
