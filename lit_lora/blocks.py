"""Repeated blocks of a denoiser."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn


def outermost_blocks(module: nn.Module, class_names: Collection[str]) -> Iterator[nn.Module]:
    """Iterate over the blocks of the named classes; of nested blocks only over the outermost."""
    # FSDP2 replaces the class of a sharded block by a subclass.
    if any(kind.__name__ in class_names for kind in type(module).__mro__):
        yield module
        return
    for child in module.children():
        yield from outermost_blocks(child, class_names)
