"""The pseudo-Huber loss with a threshold that follows the signal-to-noise ratio."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.errors import check_most
from lit_lora.objectives.criteria.pseudo_huber import PseudoHuber
from lit_lora.objectives.noise_level import NoiseLevel


@dataclass(frozen=True)
class SNRPseudoHuber(PseudoHuber):
    r"""The scheduled pseudo-Huber loss (Khrapov et al., 2024, arXiv 2403.16728) with the paper's SNR schedule.

    The threshold of :class:`PseudoHuber` is :math:`(1 - c) / (1 + SNR^{-1/2})^2 + c`: 1 for data and :math:`c` for
    noise. In flow matching this is :math:`(1 - c) (1 - \sigma)^2 + c`.

    Args:
        c: Threshold for pure noise, in (0, 1]; defaults to 0.1.

    Raises:
        UserError: If ``c`` is outside (0, 1].
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_most(1, c=self.c)

    def threshold(self, level: NoiseLevel) -> Tensor:
        threshold: Tensor = (1 - self.c) / (1 + level.snr**-0.5) ** 2 + self.c
        return threshold
