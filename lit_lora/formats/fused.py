"""LoRA of layers that are one in the original code of a model, such as query, key and value, and several in diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.families.native_layers import NativeLayer


@dataclass(frozen=True)
class LoraFactors:
    """LoRA of one layer: ``W + alpha / r * up @ down``; with DoRA each output's weights are scaled to its magnitude.

    Args:
        down: ``(r, in)``, or ``(r, in, h, w)`` for a convolution.
        up: ``(out, r)``, or ``(out, r, 1, 1)`` for a convolution.
        alpha: Alpha of the scale.
        magnitude: Magnitudes of the outputs in any shape of ``out`` elements; None without DoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank ``r``."""
        return len(self.down)


def fuse(native: NativeLayer, parts: Mapping[str, LoraFactors]) -> LoraFactors:
    """The LoRA of an original layer from those of its parts.

    Parts that share all of ``down`` keep sharing it. Otherwise ``down`` is the parts' one below the other, and ``up`` is
    block-diagonal, so that the rank is the sum of theirs; parts without LoRA get zeros.

    Args:
        native: The original layer.
        parts: LoRA of each adapted part by name; at least one.

    Raises:
        UserError: If some parts have DoRA and others have not: the magnitudes of these are not known.
    """
    present = [parts[name] for name in native.parts if name in parts]
    first = present[0]
    if len(native.parts) == 1:
        return _swapped(first) if native.swapped else first
    dora = [layer.magnitude is not None for layer in present]
    if any(dora) and (not all(dora) or len(present) < len(native.parts)):
        raise UserError(
            f"{native.name} is one layer in this format, and DoRA changes only {', '.join(sorted(parts))} of "
            f"{', '.join(native.parts)}; adapt all of them or none, or write the format diffusers"
        )
    magnitude = (
        torch.cat([layer.magnitude.flatten() for layer in present if layer.magnitude is not None])
        if any(dora)
        else None
    )
    if len(present) == len(native.parts) and all(
        torch.equal(layer.down, first.down) and layer.alpha == first.alpha for layer in present
    ):
        return LoraFactors(first.down, torch.cat([layer.up for layer in present]), first.alpha, magnitude)
    rank = sum(layer.rank for layer in present)
    first = next((layer for layer in present if layer.alpha), first)  # a scale of 0 fits no other
    scale = first.alpha / first.rank
    unit = _unit(native, parts)
    dtype = reduce(torch.promote_types, [layer.up.dtype for layer in present])
    up = first.up.new_zeros((unit * sum(native.shares), rank), dtype=dtype)
    row = column = 0
    for name, share in zip(native.parts, native.shares, strict=True):
        if name in parts:
            layer = parts[name]
            own = layer.alpha / layer.rank
            # One layer has one scale.
            block = layer.up if own == scale else layer.up * (own / scale)
            up[row : row + unit * share, column : column + layer.rank] = block
            column += layer.rank
        row += unit * share
    return LoraFactors(torch.cat([layer.down for layer in present]), up, first.alpha * rank / first.rank, magnitude)


def split(native: NativeLayer, layer: LoraFactors, ranks: Sequence[int] | None = None) -> dict[str, LoraFactors]:
    """Invert :func:`fuse`.

    Args:
        native: The original layer.
        layer: LoRA of the original layer.
        ranks: Ranks of the parts, 0 for those without LoRA, if they are known; defaults to unknown ones. Then ``up`` counts as
            block-diagonal if it looks like that with equal ranks, as kohya's scripts write it, and otherwise the parts share
            ``down``.

    Raises:
        UserError: If the number of outputs does not fit the parts.
    """
    if len(native.parts) == 1:
        return {native.parts[0]: _swapped(layer) if native.swapped else layer}
    outputs, shares, count = len(layer.up), native.shares, len(native.parts)
    if outputs % sum(shares):
        raise UserError(f"{native.name} has {outputs} outputs, which cannot be divided among {', '.join(native.parts)}")
    rows = [outputs // sum(shares) * share for share in shares]
    ups = layer.up.split(rows)
    magnitudes = [None] * count if layer.magnitude is None else layer.magnitude.flatten().split(rows)
    blocks = None
    if ranks is not None and sum(ranks) == layer.rank:
        blocks = list(ranks)
    elif ranks is None and layer.rank % count == 0 and bool(layer.up.any()):
        blocks = [layer.rank // count] * count
    if blocks is not None and _is_block_diagonal(ups, blocks):
        downs = layer.down.split(blocks)
        return {
            name: LoraFactors(down, columns, layer.alpha * block / layer.rank, magnitude)
            for name, down, columns, block, magnitude in zip(
                native.parts, downs, _diagonal(ups, blocks), blocks, magnitudes, strict=True
            )
            if block
        }
    return {
        name: LoraFactors(layer.down, up, layer.alpha, magnitude)
        for name, up, magnitude in zip(native.parts, ups, magnitudes, strict=True)
    }


def _unit(native: NativeLayer, parts: Mapping[str, LoraFactors]) -> int:
    """Number of outputs per share."""
    for name, share in zip(native.parts, native.shares, strict=True):
        if name in parts:
            return len(parts[name].up) // share
    raise AssertionError("at least one part is adapted")


def _diagonal(ups: Sequence[Tensor], blocks: Sequence[int]) -> list[Tensor]:
    starts = [sum(blocks[:i]) for i in range(len(blocks))]
    return [up[:, start : start + block] for up, start, block in zip(ups, starts, blocks, strict=True)]


def _is_block_diagonal(ups: Sequence[Tensor], blocks: Sequence[int]) -> bool:
    inside = sum(int(block.count_nonzero()) for block in _diagonal(ups, blocks))
    return inside == sum(int(up.count_nonzero()) for up in ups)


def _swapped(layer: LoraFactors) -> LoraFactors:
    """The layer with the halves of its outputs exchanged, if they are two vectors of the size of its input."""
    if len(layer.up) != 2 * layer.down.shape[1]:
        return layer
    magnitude = None if layer.magnitude is None else layer.magnitude.flatten().roll(len(layer.up) // 2)
    return replace(layer, up=layer.up.roll(len(layer.up) // 2, dims=0), magnitude=magnitude)
