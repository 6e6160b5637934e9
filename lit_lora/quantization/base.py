"""What a quantization of frozen weights is: how a weight becomes stored tensors and how it comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor

from lit_lora.errors import UserError

Stored = Mapping[str, Tensor]
"""The tensors that a weight is stored as, by name."""


class Quantization(ABC):
    """Stores the weights of Linear and Conv2d layers; norms, embeddings, biases and the adapter are never its business.

    Args:
        skip: Glob patterns of further layers that stay in ``base_dtype``, such as ``mid_block.*``. Each family has
            layers of its own that stay, those that the timestep goes through among them.

    Raises:
        UserError: If an option is outside its range.
    """

    def __init__(self, skip: Sequence[str] = ()) -> None:
        self.skip = tuple(skip)

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors to keep of a weight, floating point of any shape."""

    @abstractmethod
    def dequantize(self, stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight, of this shape and dtype, as near as the quantization allows; without gradients."""

    def takes(self, name: str, always_skipped: Sequence[str] = ()) -> bool:
        """Whether the layer of this name is stored so, and not in ``base_dtype``."""
        return not any(fnmatch(name, pattern) for pattern in (*always_skipped, *self.skip))

    def check(self, device: torch.device) -> None:
        """Make sure that the device can do it.

        Raises:
            UserError: If the device does not support this format.
        """
        try:
            # Every row has a scale of its own.
            weight = torch.ones(64, 64, device=device) * torch.arange(1, 65, device=device)[:, None]
            restored = self.dequantize(self.quantize(weight), weight.shape, torch.bfloat16)
            near = bool(((restored.float() / weight - 1).abs() < 0.2).all())
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"quantization={type(self).__name__}: {device} cannot store weights so ({str(error).splitlines()[0]}); use "
                f"lit_lora.quantization.{'Dense' if type(self).__name__ == 'Int8' else 'Int8'}"
            ) from error
        if not near:
            raise UserError(
                f"quantization={type(self).__name__}: {device} gives other weights back; use lit_lora.quantization.Dense"
            )
