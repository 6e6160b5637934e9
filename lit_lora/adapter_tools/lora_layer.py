"""One layer of a LoRA or DoRA, between its tensors and its update."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lit_lora.adapter_tools.low_rank import LowRank
from lit_lora.errors import UserError
from lit_lora.mapped import Keep


def narrowed(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Finite values in another dtype.

    Args:
        values: The values.
        dtype: dtype of the result.
        name: What they are, for errors.

    Raises:
        UserError: If a value is beyond the dtype's range, or all values become zero.
    """
    made, kind = values.to(dtype), str(dtype).removeprefix("torch.")
    largest = max(map(abs, map(float, values.aminmax()))) if values.numel() else 0.0  # NaN if a value is
    if not math.isfinite(largest):
        raise UserError(f"{name} would be NaN or Inf; check the adapters and their weights")
    if not made.isfinite().all():
        raise UserError(
            f"{name} would reach {largest:.6g}, and {kind} holds at most {torch.finfo(dtype).max:.6g}; use bfloat16 or float32"
        )
    if largest > 0 and not made.any():
        raise UserError(
            f"{name} would reach {largest:.6g} at most, which {kind} rounds to zero; use bfloat16 or float32"
        )
    return made


@dataclass(frozen=True)
class LoraLayer:
    """One layer of a LoRA or DoRA: ``scale * up @ down``, with the magnitudes of DoRA beside it.

    PEFT's matrix A of a grouped convolution reaches all inputs, and its matrix B is grouped, so that each group of outputs has
    a low-rank matrix of its own.

    Args:
        down: PEFT's A: ``(r, in)`` of a Linear, ``(r, in, h, w)`` of a Conv2d.
        up: PEFT's B: ``(out, r)`` of a Linear, ``(out, r / groups, 1, 1)`` of a Conv2d.
        alpha: PEFT's ``lora_alpha`` of the layer.
        rslora: Whether the update is scaled by ``alpha / sqrt(r)`` instead of ``alpha / r``. Defaults to False.
        magnitude: DoRA's magnitudes, ``out`` values; defaults to None, for LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """PEFT's ``r``: the number of rows of A."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; 1 for other layers."""
        return self.rank // self.up.shape[1]

    @property
    def most(self) -> int:
        """The largest rank with which the layer's update can use all components."""
        return self.groups * min(len(self.up) // self.groups, prod(self.down.shape[1:]))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the layer's update: that of the base's weight, except for grouped convolutions."""
        return (len(self.up), *self.down.shape[1:])

    @property
    def bytes_per_step(self) -> int:
        """Size of the tensors' part that grows with the rank, for each group's next component."""
        of_down = prod(self.down.shape[1:]) * self.groups * self.down.element_size()
        return of_down + len(self.up) * self.up.element_size()

    def update(self) -> LowRank:
        """The update with its scale."""
        groups = self.groups
        up = self.up.detach().double().reshape(groups, len(self.up) // groups, -1)
        down = self.down.detach().double().reshape(groups, self.rank // groups, -1)
        return LowRank(up * self.scale, down)

    def with_update(self, update: LowRank, name: str, dtype: torch.dtype | None = None) -> LoraLayer:
        """The layer with another update, and the same alpha.

        Args:
            update: Update with its scale; zero if the alpha is.
            name: Name of the layer, for errors.
            dtype: dtype of the tensors; defaults to those of this layer.

        Raises:
            UserError: If a value is beyond the dtype's range.
        """
        rank = update.rank * self.groups
        down = update.down.reshape(rank, *self.down.shape[1:])
        up = update.up.reshape(len(self.up), update.rank, *self.up.shape[2:])
        scale = self.alpha / (math.sqrt(rank) if self.rslora else rank)
        up = up / scale if scale else torch.zeros_like(up)
        down = narrowed(down, dtype or self.down.dtype, f"lora_A of {name}")
        up = narrowed(up, dtype or self.up.dtype, f"lora_B of {name}")
        return replace(self, down=down.contiguous(), up=up.contiguous())

    def kept(self, keep: Keep) -> LoraLayer:
        """The layer with its two matrices put where they stay."""
        return replace(self, down=keep(self.down), up=keep(self.up))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the ends of PEFT's names."""
        named = {"lora_A.weight": self.down, "lora_B.weight": self.up}
        return named if self.magnitude is None else named | {"lora_magnitude_vector": self.magnitude}

    def delta(self) -> Tensor:
        """The change of the base's weight in float32, ``weight_shape``."""
        groups, down, up = self.groups, self.down.detach().float(), self.up.detach().float()
        up, down = up.reshape(groups, len(up) // groups, -1), down.reshape(groups, self.rank // groups, -1)
        return ((self.scale * up) @ down).reshape(self.weight_shape)
