from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_lora.blocks import compile_blocks
from lit_lora.errors import UserError
from lit_lora.memory.block_offload import BlockOffload


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


def test_more_kinds_of_blocks_are_compiled_than_torch_allows_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: compile_module(block, backend=backend))
    config: Any = torch._dynamo.config
    torch._dynamo.reset()
    blocks = nn.ModuleList(Block(width) for width in range(2, 12))
    with config.patch(recompile_limit=8, accumulated_recompile_limit=8):
        compile_blocks(blocks, ["Block"])
        for block in blocks:
            block(torch.ones(1, 4))
    assert len(compiled) == len(blocks)


def test_a_model_without_blocks_of_the_names_is_refused() -> None:
    with pytest.raises(
        UserError, match="compile_blocks has no effect, since ModuleList has no block of the classes Blok"
    ):
        compile_blocks(nn.ModuleList([Block(2)]), ["Blok"])
    with pytest.raises(
        UserError, match=r"memory\.offload_blocks has no effect, since Block has no block of the .* \(none\)"
    ):
        BlockOffload(Block(2), [])
