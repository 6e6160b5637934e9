"""Options that change how the denoiser computes and where its weights are, but not what it computes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lit_lora.blocks import compile_blocks
from lit_lora.errors import UserError
from lit_lora.memory.block_offload import BlockOffload
from lit_lora.memory.checkpointing import enable_gradient_checkpointing
from lit_lora.memory.options import MemoryOptions


def apply_options(
    denoiser: nn.Module, block_classes: Collection[str], memory: MemoryOptions, compiled: bool, channels_last: bool
) -> None:
    """Apply the options to a denoiser with its adapter, in place.

    Args:
        denoiser: Denoiser in host memory.
        block_classes: Class names of its blocks.
        memory: Options, of which those for blocks are applied.
        compiled: Whether its blocks are compiled.
        channels_last: Whether its convolutions compute in the memory format ``channels_last``.

    Raises:
        UserError: If an option would have no effect on the denoiser.
    """
    if channels_last:
        use_channels_last(denoiser)
    if memory.gradient_checkpointing:
        enable_gradient_checkpointing(denoiser, memory.gradient_checkpointing)
    if compiled:
        compile_blocks(denoiser, block_classes)
    if memory.offload_blocks:
        BlockOffload(denoiser, tuple(block_classes))


def use_channels_last(model: nn.Module) -> None:
    """Store the frozen dense weights of a model's convolutions in the memory format ``channels_last``, in place.

    A convolution whose weight has this format returns it too, so that the input needs no change. Quantized weights stay as they
    are: their layers restore them in each pass, and take either format.

    Raises:
        UserError: If the model has no such convolution.
    """
    changed = False
    for layer in model.modules():
        weight: Any = layer._parameters.get("weight") if isinstance(layer, nn.Conv2d) else None
        if weight is not None and not weight.requires_grad:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            changed = True
    if not changed:
        raise UserError(
            f"channels_last has no effect, since {type(model).__name__} has no Conv2d layer with a dense frozen weight; leave "
            f"it out"
        )
