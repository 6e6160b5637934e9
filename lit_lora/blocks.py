"""Repeated blocks of a denoiser, and compiling them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from lit_lora.errors import UserError

_COMPILATIONS_OF_A_BLOCK = 64
"""Bound of how often a block is compiled: for other sizes of its inputs and weights, with gradients and without."""

_RANKS = r".*lora_[AB].*weight.*"
"""Weights that have a rank, by the names that torch.compile gives them."""


def outermost_blocks(module: nn.Module, class_names: Collection[str]) -> Iterator[nn.Module]:
    """Iterate over the blocks of the named classes; of nested blocks only over the outermost."""
    # FSDP2 replaces the class of a sharded block by a subclass.
    if any(kind.__name__ in class_names for kind in type(module).__mro__):
        yield module
        return
    for child in module.children():
        yield from outermost_blocks(child, class_names)


def found_blocks(module: nn.Module, class_names: Collection[str], option: str) -> list[nn.Module]:
    """The outermost blocks of the named classes.

    Args:
        module: Module with the blocks.
        class_names: Names of their classes.
        option: Name of the option that needs them, for the error.

    Raises:
        UserError: If there is none.
    """
    if not (blocks := list(outermost_blocks(module, class_names))):
        raise UserError(
            f"{option} has no effect, since {type(module).__name__} has no block of the classes "
            f"{', '.join(class_names) or '(none)'}; correct block_classes of its family, or leave the option out"
        )
    return blocks


def compile_blocks(module: nn.Module, class_names: Collection[str]) -> None:
    """Compile the outermost blocks of the named classes with ``torch.compile``, in place, which keeps the names of the weights.

    By default torch leaves code as it is once it is compiled for eight kinds of inputs and weights, of all blocks together;
    the blocks of Stable Diffusion are of more kinds. The bound is raised for this process.

    Raises:
        UserError: If there is no such block.
    """
    blocks = found_blocks(module, class_names, "compile_blocks")
    for block in blocks:
        block.compile()
    config: Any = torch._dynamo.config
    most = _COMPILATIONS_OF_A_BLOCK * len(blocks)
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)


def compile_for_any_rank() -> None:
    """Let blocks that are compiled from now on in this process serve all ranks of LoRA, except that torch compiles for 1 anew."""
    config: Any = torch.compiler.config
    if _RANKS not in config.dynamic_sources:
        config.dynamic_sources = ",".join(filter(None, (config.dynamic_sources, _RANKS)))
