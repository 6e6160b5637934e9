"""The pseudo-Huber loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.errors import check_above
from lit_lora.objectives.criteria.base import Criterion
from lit_lora.objectives.noise_level import NoiseLevel


@dataclass(frozen=True)
class PseudoHuber(Criterion):
    r"""The pseudo-Huber loss: squared for small errors, linear for large ones, which are often faults of the data.

    An error :math:`d` counts :math:`2 c (\sqrt{d^2 + c^2} - c)`, as in diffusers' and kohya's scripts: about :math:`d^2` below
    the threshold :math:`c`, and about :math:`2 c |d|` above it.

    Args:
        c: Threshold, above 0; defaults to 0.1.

    Raises:
        UserError: If ``c`` is not above 0.
    """

    c: float = 0.1

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_above(0, c=self.c)

    def threshold(self, level: NoiseLevel) -> Tensor:
        """Threshold of each sample, float32 ``(B,)``.

        Args:
            level: Noise levels of the samples.
        """
        return level.time.new_full(level.time.shape, self.c)

    def errors(self, difference: Tensor, level: NoiseLevel) -> Tensor:
        c = self.threshold(level).view(-1, *[1] * (difference.ndim - 1))
        return 2 * c * ((difference**2 + c**2).sqrt() - c)
