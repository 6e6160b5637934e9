"""Tensors that are mapped from files keep their values and give their memory back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.process_memory import resident
from lit_lora import mapped
from lit_lora.files import sync
from lit_lora.formats.tensor_file import write_tensors
from lit_lora.mapped import Keep, keep_on_disk, release
from tests.helpers import largest_file

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere pages are not released")


def parts_of(path: Path) -> tuple[Any, bytes]:
    """Header and values of a safetensors file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    assert end % 8 == 0
    return json.loads(data[8:end]), data[end:]


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keep:
    monkeypatch.setattr(mapped, "SMALL", 100)
    return keep_on_disk(tmp_path / "new")


def test_values_stay(keep: Keep, tmp_path: Path) -> None:
    tensors = [torch.ones(3, 0), torch.randn(5, 5), torch.randn(6, 6), torch.randn(1000, 5).bfloat16().T]
    kept = [keep(tensor) for tensor in tensors]
    assert [one is other for one, other in zip(tensors, kept, strict=True)] == [True, True, False, False]
    release(*tensors, *kept)
    for one, other in zip(tensors, kept, strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert not [*(tmp_path / "new").iterdir()]


@linux
def test_kept_tensors_hold_no_files_open(keep: Keep) -> None:
    """A process may have 1024 open files, and an adapter has as many tensors."""
    before = len(os.listdir("/proc/self/fd"))
    kept = [keep(torch.randn(30)) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert kept[19].untyped_storage().filename


def test_a_full_disk_is_an_error_that_names_the_folder(keep: Keep, tmp_path: Path) -> None:
    with largest_file(10_000), pytest.raises(OSError, match="File too large") as caught:
        keep(torch.randn(100, 100))
    assert caught.value.filename == str(tmp_path / "new")
    assert not [*(tmp_path / "new").iterdir()]


def test_what_cannot_be_mapped_stays_in_memory(keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 400 bytes from file: No such device (19)")

    monkeypatch.setattr(torch, "from_file", refuse)
    tensor = torch.randn(100)
    assert keep(tensor) is tensor
    assert not [*(tmp_path / "new").iterdir()]


@linux
def test_memory_is_given_back(tmp_path: Path) -> None:
    save_file({"x": torch.randn(10_000_000)}, tmp_path / "x.safetensors")
    sync(tmp_path / "x.safetensors")  # pages stay while they are being written to the disk
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        tensor = opened.get_tensor("x")
    tensor[5_000_000:5_000_100] = 3  # private pages must stay as they are now
    total = float(tensor.sum())
    before = resident()
    release(tensor)
    assert before - resident() > 30_000_000
    assert float(tensor.sum()) == total


@linux
def test_memory_of_kept_tensors_is_given_back(keep: Keep) -> None:
    kept = keep(torch.randn(10_000_000))
    kept += 1
    total = float(kept.sum())
    before = resident()
    release(kept)
    assert before - resident() > 30_000_000
    assert float(kept.sum()) == total


@linux
def test_writing_needs_no_memory_for_mapped_tensors(keep: Keep, tmp_path: Path) -> None:
    kept = {str(number): keep(torch.randn(5_000_000)) for number in range(3)}
    before = resident()
    write_tensors(tmp_path / "x.safetensors", kept, {})
    assert resident() - before < 20_000_000


def test_written_tensors_can_be_resized(tmp_path: Path) -> None:
    """FSDP does so with the memory of parameters."""
    tensor = nn.Parameter(torch.randn(3))
    write_tensors(tmp_path / "x.safetensors", {"x": tensor}, {})
    assert tensor.untyped_storage().resizable()


def test_a_file_may_be_written_from_its_own_tensors(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(30, 3), "d": torch.arange(5), "c": torch.randn(2, 2).half(), "a": torch.tensor(True)}
    path = tmp_path / "x.safetensors"
    for _ in range(2):
        write_tensors(path, tensors, {"z": "1", "a": "\u2605"})
        tensors = load_file(path)
    with safe_open(path, framework="pt") as opened:
        told = opened.metadata()
    assert told == {"a": "\u2605", "format": "pt", "z": "1"}
    assert torch.equal(tensors["d"], torch.arange(5))
    save_file(tensors, tmp_path / "theirs.safetensors", metadata=told)
    for first, second in zip(parts_of(path), parts_of(tmp_path / "theirs.safetensors"), strict=True):
        assert first == second
