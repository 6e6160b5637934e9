"""The contrastive term of flow matching."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.errors import UserError


@dataclass(frozen=True)
class Contrast:
    r"""Contrastive flow matching (ΔFM, Stoica et al., 2025, arXiv 2506.05350, equation 4).

    From the error of a prediction ``v`` it subtracts ``weight * |v - w|^2``, the squared distance from the target ``w`` of
    another sample of the batch: predictions for different captions are driven apart.

    Args:
        weight: Factor :math:`\lambda`, above 0 and below 1: from 1 on the loss has no minimum. Defaults to 0.05, as in the
            paper.

    Raises:
        UserError: If ``weight`` is outside (0, 1).
    """

    weight: float = 0.05

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not 0 < self.weight < 1:
            raise UserError(f"weight={self.weight} of Contrast must lie between 0 and 1; the paper has 0.05")

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What is subtracted from the error of each element, float32 ``(B, *latent_shape)``.

        The other sample is the next in the batch; batches are shuffled.

        Args:
            prediction: Predictions, float32 ``(B, *latent_shape)``.
            target: Their targets, float32 ``(B, *latent_shape)``.

        Raises:
            UserError: If there is only one sample.
        """
        if len(target) < 2:
            raise UserError(
                "contrast needs another sample in the batch of each process, and there is only 1; set batch_size to at least 2, "
                "or leave contrast out"
            )
        difference = prediction - target.roll(1, 0)
        return self.weight * difference * difference
