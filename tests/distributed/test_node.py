"""Tensors that the processes of a machine map from one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lit_lora.distributed.node import Node, bundles
from lit_lora.errors import UserError
from lit_lora.mapped import is_mapped
from lit_lora.quantization import NF4, Dense, Quantization
from lit_lora.quantization.frozen_layer import frozen_layers
from lit_lora.quantization.load import load_model
from tests.helpers import largest_file, processes


def load(folder: Path, quantization: Quantization, node: Node | None = None) -> torch.nn.Module:
    return load_model(UNet2DConditionModel, str(folder), "unet", quantization, torch.float32, node=node)


@pytest.fixture(autouse=True)
def few_bytes_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_lora.mapped.SMALL", 1000)


@pytest.mark.parametrize("quantization", [Dense(), NF4()], ids=lambda s: type(s).__name__)
def test_large_weights_of_frozen_layers_stay_in_files(
    quantization: Quantization, sd_folder: Path, tmp_path: Path
) -> None:
    model = load(sd_folder, quantization, Node(folder=tmp_path / "mapped"))
    expected = load(sd_folder, quantization).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    stored = {
        value.data_ptr(): value
        for layer in frozen_layers(model)
        for value in map(layer.get_parameter, layer.stored_names)
    }
    large = {address for address, value in stored.items() if value.nbytes > 1000}
    assert len(large) > 10
    assert {value.data_ptr() for value in model.state_dict().values() if is_mapped(value)} == large
    assert not [*(tmp_path / "mapped").iterdir()]


def test_a_full_disk(sd_folder: Path, tmp_path: Path) -> None:
    with largest_file(1500), pytest.raises(OSError, match="File too large") as caught:
        load(sd_folder, Dense(), Node(folder=tmp_path / "mapped"))
    assert caught.value.filename == str(tmp_path / "mapped")
    assert not [*(tmp_path / "mapped").iterdir()]


def test_a_file_system_that_cannot_map(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 400 bytes from file: No such device (19)")

    monkeypatch.setattr(torch, "from_file", refuse)
    with pytest.raises(
        UserError, match=r"mapped is on a file system that cannot map files .*; name a folder on a local"
    ):
        load(sd_folder, Dense(), Node(folder=tmp_path / "mapped"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        Node(folder=tmp_path / "file" / "mapped")


@pytest.mark.slow
def test_two_processes_share_one_file(tmp_path: Path) -> None:
    processes(["-m", "tests.distributed.node_script", tmp_path], 2, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["equal"] == [True, True]
        assert found["mapped"] == [True, False, False, False]
        assert found["left"] == []
        assert found["seen"][0] == 3, "what one process writes, the other one reads"
        assert found["seen"][1] > 3
        assert found["error"] == "File too large"
        assert found["arrived"]
        assert len(found["messages"]) == 3
        assert found["messages"][1] == 20_000_000


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([], []), ([1, 2, 3], [[1, 2, 3]]), ([3, 3, 1], [[3, 3], [1]]), ([9, 1, 9, 9], [[9], [1], [9], [9]])],
)
def test_bundles_have_at_most_a_size(sizes: list[int], expected: list[list[int]]) -> None:
    assert list(bundles(sizes, int, 6)) == expected
