"""The parts of a model that are loaded and sharded one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from lit_lora.blocks import outermost_blocks
from lit_lora.quantization.frozen_layer import FrozenLayer, can_freeze

_LARGE_LAYER = 8 << 20
"""Number of weights from which a layer is sharded by itself: large enough to gather efficiently, small beside a block."""


def sharded_parts(model: nn.Module, block_classes: Collection[str]) -> Iterator[nn.Module]:
    """The parts of :meth:`Weights.in_parts`, inner parts first; the weights may be loaded and quantized already.

    Args:
        model: The model.
        block_classes: Class names of the blocks; of nested blocks the outermost is a part.
    """
    return _parts(model, set(outermost_blocks(model, block_classes)))


def _parts(module: nn.Module, blocks: set[nn.Module], inside: bool = False) -> Iterator[nn.Module]:
    block = module in blocks
    around_blocks = not inside and not blocks.isdisjoint(module.modules())
    for child in module.children():
        yield from _parts(child, blocks, inside or block)
    container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    if block or _weights(module) >= _LARGE_LAYER or (around_blocks and not container):
        yield module


def _weights(layer: nn.Module) -> int:
    """Number of weights of a Linear or Conv2d layer; 0 for other modules."""
    if isinstance(layer, FrozenLayer) and layer.stored_names:  # not one that PEFT made from the base layer's class
        return layer.weight_shape.numel()
    weight = layer._parameters.get("weight") if can_freeze(layer) else None
    return 0 if weight is None else weight.numel()
