"""The repeated parts of a denoiser."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn


def outermost_blocks(module: nn.Module, class_names: Collection[str]) -> Iterator[nn.Module]:
    """The blocks of these classes; of blocks inside each other the outermost."""
    # Sharing out the weights makes a class of each block's class.
    if any(kind.__name__ in class_names for kind in type(module).__mro__):
        yield module
        return
    for child in module.children():
        yield from outermost_blocks(child, class_names)
