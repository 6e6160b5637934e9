"""Tensors of a file are read one by one, and few of them are in memory at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_lora.tensor_reader import KEPT_OPEN, TensorReader


def _mapped(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split("-")[0].isalnum() and "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def test_values_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = {str(number): torch.randn(number, 3) for number in range(5)} | {"half": torch.randn(4).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path / "model.safetensors")
    for name, value in [*tensors.items(), *reversed(tensors.items())]:
        assert torch.equal(reader.tensor(name), value)


def test_little_of_a_file_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = KEPT_OPEN // 4
    save_file({str(number): torch.ones(size, dtype=torch.uint8) for number in range(16)}, path)
    reader = TensorReader(path)
    most = 0
    for number in range(16):
        assert reader.tensor(str(number)).sum() == size
        most = max(most, _mapped(path))
    assert size <= most <= KEPT_OPEN + size


def test_it_is_not_opened_for_each_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, path)
    reader = TensorReader(path)
    reader.tensor("a")
    path.unlink()
    assert torch.equal(reader.tensor("b"), torch.zeros(2))


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"no tensors", "is damaged"), (b"", "is damaged")]
)
def test_a_file_that_cannot_be_read(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OSError, match=said):
        TensorReader(path).tensor("a")


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(OSError, match=r"model\.safetensors is damaged: .*'b'|tensor b"):
        TensorReader(tmp_path / "model.safetensors").tensor("b")
