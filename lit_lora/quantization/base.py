"""The interface of a quantization of frozen weights: quantize and dequantize."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.errors import UserError

Stored = Mapping[str, Tensor]
"""Tensors of a quantized weight, by name."""


class Quantization(ABC):
    """A storage format for frozen weights of Linear and Conv2d layers.

    Norms, embeddings, biases and the adapter are not quantized.

    Args:
        skip: Glob patterns of further layers that stay in ``base_dtype``, such as ``mid_block.*``; none by default. Each
            family names layers that always stay, for example those of the timestep embedding.

    Raises:
        UserError: If an option is outside its range.
    """

    def __init__(self, skip: Sequence[str] = ()) -> None:
        check_types(Quantization, locals())
        self.skip = tuple(skip)

    def __repr__(self) -> str:
        """Class and options; equal texts mean equal quantizations."""
        options = inspect.signature(type(self).__init__).parameters
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in options if n != 'self')})"

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize a floating point weight of any shape into the tensors to store."""

    @abstractmethod
    def dequantize(self, stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Restore a weight in the given shape and dtype, up to the quantization error; without gradients."""

    def product(self, rows: Tensor, stored: Stored, shape: torch.Size, bias: Tensor | None = None) -> Tensor:
        """The output of a Linear layer, ``rows W^T + bias``, by default from the restored weight.

        Args:
            rows: Inputs, ``(n, in)``.
            stored: Tensors of the weight.
            shape: Shape of the weight, ``(out, in)``.
            bias: ``(out,)``; defaults to none.

        Returns:
            ``(n, out)`` in the dtype of ``rows``.
        """
        return F.linear(rows, self.dequantize(stored, shape, rows.dtype), bias)

    def gradient_product(self, grad: Tensor, stored: Stored, shape: torch.Size) -> Tensor:
        """The gradient with respect to a Linear layer's input, ``grad W``, by default from the restored weight.

        Args:
            grad: Gradient with respect to the output, ``(n, out)``.
            stored: Tensors of the weight.
            shape: Shape of the weight, ``(out, in)``.

        Returns:
            ``(n, in)`` in the dtype of ``grad``.
        """
        return grad @ self.dequantize(stored, shape, grad.dtype)

    def takes(self, name: str, always_skipped: Sequence[str] = ()) -> bool:
        """Whether the layer of this name is quantized; otherwise it stays in ``base_dtype``."""
        return not any(fnmatch(name, pattern) for pattern in (*always_skipped, *self.skip))

    def check_skipped(self, names: Collection[str]) -> None:
        """Check that each pattern of ``skip`` matches a layer.

        Args:
            names: Names of the layers that can be quantized.

        Raises:
            UserError: If a pattern matches none.
        """
        for pattern in self.skip:
            if not any(fnmatch(name, pattern) for name in names):
                raise UserError(
                    f"skip: {pattern!r} matches none of the {len(names)} layers that {type(self).__name__} quantizes; correct or "
                    f"remove it. The first of their names is {next(iter(names), 'none')}"
                )

    def check(self, device: torch.device) -> None:
        """Check that the device supports this quantization, by restoring a small weight and by its product with the identity.

        Args:
            device: Device that will hold the weights.

        Raises:
            UserError: If the device does not support the format or returns wrong values.
        """
        instead = f"use lit_lora.quantization.{'Dense' if type(self).__name__ == 'Int8' else 'Int8'}"
        try:
            # Each row gets its own scale.
            weight = torch.ones(64, 64, device=device) * torch.arange(1, 65, device=device)[:, None]
            stored = self.quantize(weight)
            product = self.product(torch.eye(64, device=device), stored, weight.shape).T
            restored = torch.stack([product, self.dequantize(stored, weight.shape, torch.bfloat16).float()])
            near = bool(((restored / weight - 1).abs() < 0.2).all())
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"quantization={type(self).__name__}: {device} does not support this format ({str(error).splitlines()[0]}); "
                f"{instead}"
            ) from error
        if not near:
            raise UserError(
                f"quantization={type(self).__name__}: {device} returns wrong values in this format; {instead}"
            )
