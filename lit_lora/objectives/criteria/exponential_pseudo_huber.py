"""The pseudo-Huber loss with a threshold that falls exponentially with the noise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.errors import check_most
from lit_lora.objectives.criteria.pseudo_huber import PseudoHuber
from lit_lora.objectives.noise_level import NoiseLevel


@dataclass(frozen=True)
class ExponentialPseudoHuber(PseudoHuber):
    r"""The scheduled pseudo-Huber loss (Khrapov et al., 2024, arXiv 2403.16728) with the paper's exponential schedule.

    The threshold of :class:`PseudoHuber` is :math:`c^{t / T}`: 1 for data, where details are learned with the squared error, and
    :math:`c` for noise, where outliers of the data do the most harm.

    Args:
        c: Threshold for pure noise, in (0, 1]; defaults to 0.1.

    Raises:
        UserError: If ``c`` is outside (0, 1].
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_most(1, c=self.c)

    def threshold(self, level: NoiseLevel) -> Tensor:
        return self.c**level.time
