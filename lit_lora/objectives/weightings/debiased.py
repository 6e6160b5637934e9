"""Debiased estimation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.objectives.weightings.snr_weighting import SNRWeighting


@dataclass(frozen=True)
class DebiasedEstimation(SNRWeighting):
    r"""Debiased estimation (Yu et al., 2023, arXiv 2310.08442): more weight where the noise hides the image.

    An error of :math:`\epsilon` becomes one of :math:`x_0` that is :math:`1 / \sqrt{SNR}` times as large, and this is
    its weight. That of :math:`x_0` is :math:`\sqrt{SNR}`; see :class:`SNRWeighting` for the velocity.
    """

    def of_sample(self, snr: Tensor) -> Tensor:
        return snr.sqrt()
