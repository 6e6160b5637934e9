"""Frozen blocks in files: the same training, nothing in memory that could stay in the file, and one file for all processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lit_lora.mapped import is_mapped, keep_on_disk
from lit_lora.memory.block_offload import BlockOffload
from lit_lora.memory.mapped_weights import FileReader, MappedWeights
from lit_lora.memory.page_locked import aligned_bytes
from lit_lora.quantization import NF4, Dense, Quantization
from lit_lora.quantization.frozen_layer import frozen_layers
from tests.memory.test_block_offload import BLOCKS, assert_equal, make_model, train


def in_files(model: nn.Module, folder: Path) -> None:
    """Let the weights of half of a model's frozen layers be mapped from files."""
    keep = keep_on_disk(folder)
    for layer in [*frozen_layers(model)][::2]:
        for name in layer.stored_names:
            layer.get_parameter(name).data = keep(layer.get_parameter(name).data)


@pytest.mark.parametrize("quantization", [Dense(), NF4()], ids=lambda s: type(s).__name__)
def test_training_is_the_same(quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(make_model(quantization=quantization))
    model = make_model(quantization=quantization)
    monkeypatch.setattr("lit_lora.mapped.SMALL", 256)
    in_files(model, tmp_path)
    offload = BlockOffload(model, BLOCKS, smallest_bytes=0, folder=tmp_path)
    mapped = [block for block in offload._blocks if isinstance(block, MappedWeights)]
    assert len(mapped) == len(offload._blocks) > 2
    assert_equal(train(model), expected)
    assert sum(block.is_on_device for block in mapped) == 2
    offload.release()
    values = [value for block in mapped for value in block._host if value.nbytes > 256]
    assert len(values) > 10
    assert all(map(is_mapped, values))


def test_a_copy_is_complete_when_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that copies may be slow; a block that is dropped meanwhile has its file's values again."""
    monkeypatch.setattr("lit_lora.mapped.SMALL", 256)
    values = torch.randn(100, 100)
    tensor = nn.Parameter(keep_on_disk(tmp_path)(values.clone()), requires_grad=False)
    weights = MappedWeights([tensor])
    weights.reader = FileReader(torch.device("cpu"), None, 0)
    for _ in range(3):
        for size in (1, 2_000_000):
            busy = torch.randn(size)
            weights.reader.read([busy], [torch.empty_like(busy)])
        weights.fetch(torch.device("cpu"))
        weights.wait()
        assert torch.equal(tensor, values)
        assert not is_mapped(tensor)
        weights.drop()
        weights.fetch(torch.device("cpu"))
        weights.drop()
        assert is_mapped(tensor)
        assert torch.equal(tensor, values)


def test_an_error_of_the_thread_is_raised_where_the_weights_are_used(tmp_path: Path) -> None:
    weights = MappedWeights([torch.randn(3)])
    weights.reader = FileReader(torch.device("cpu"), None, 0)
    weights.reader.read = lambda _, copies: FileReader.read(weights.reader, [torch.randn(4)], copies)  # type: ignore[method-assign]
    weights.fetch(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="size"):
        weights.wait()


def test_tensors_begin_at_aligned_addresses_of_a_buffer() -> None:
    sizes = [aligned_bytes(torch.zeros(size, dtype=torch.uint8)) for size in (0, 1, 256, 257)]
    assert sizes == [0, 256, 256, 512]
    assert MappedWeights([torch.zeros(1), torch.zeros(65)]).staged_bytes == 256 + 512
