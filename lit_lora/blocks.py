"""The repeated parts of a denoiser."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn


def outermost_blocks(module: nn.Module, class_names: Collection[str]) -> Iterator[nn.Module]:
    """The blocks of these classes; of blocks inside each other the outermost."""
    if type(module).__name__ in class_names:
        yield module
        return
    for child in module.children():
        yield from outermost_blocks(child, class_names)
