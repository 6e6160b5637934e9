"""Options that change how the denoiser computes, but not what it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_lora.adapters.fused_lora import fuse
from lit_lora.blocks import compile_blocks
from lit_lora.errors import UserError
from lit_lora.memory.block_offload import BlockOffload
from lit_lora.memory.checkpointing import enable_gradient_checkpointing
from lit_lora.quantization.packed_convolution import pack_convolutions

if TYPE_CHECKING:
    from lit_lora.module import LoraDiffusion


def apply_options(module: LoraDiffusion) -> None:
    """Apply a module's options to its denoiser, which is in host memory and has its adapter.

    Raises:
        UserError: If an option would have no effect on the denoiser.
    """
    denoiser, blocks = module.family.denoiser, module.family.block_classes
    if module.convolutions == "channels_last":
        use_channels_last(denoiser)
    elif module.convolutions == "packed":
        pack_convolutions(denoiser)
    if module.fused_lora and not fuse(denoiser):
        raise UserError("fused_lora has no effect, since no frozen Linear layer has an adapter of LoRA; leave it out")
    if module.memory.gradient_checkpointing:
        enable_gradient_checkpointing(denoiser, module.memory.gradient_checkpointing)
    if module.compile_blocks:
        compile_blocks(denoiser, blocks)
    if module.memory.offload_blocks:
        BlockOffload(denoiser, blocks, folder=module.memory.offload_folder)


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
            f"convolutions='channels_last' has no effect, since {type(model).__name__} has no Conv2d layer with a dense frozen "
            f"weight; use 'plain'"
        )
