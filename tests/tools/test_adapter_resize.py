"""``lit-lora adapter resize``."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from lit_lora import mapped
from lit_lora.cli import main
from lit_lora.formats import write_adapter
from lit_lora.formats.find import read_adapter
from tests.adapter_tools.unet import unet_adapter
from tests.helpers import largest_file


@pytest.fixture(scope="module")
def folder(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of seven layers of a UNet, rank 4, written by PEFT and diffusers."""
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    names = [name for name, _ in unet.named_modules() if name.endswith(("to_q", "conv_in", "conv1"))][:7]
    made = tmp_path_factory.mktemp("adapter")
    write_adapter(unet_adapter(unet, names), made)
    return made


def test_the_screen_fits_and_adds_up(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["adapter", "resize", str(folder), str(tmp_path / "out"), "--energy", "0.9"]
    assert main(command) == 0
    kinds = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in kinds if line.startswith("down_blocks.*.resnets.*.conv1 ")] == ["2"]
    assert main([*command, "--layers", "--overwrite"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == kinds[0].split() == ["layers", "count", "rank", "kept"]
    assert max(map(len, [*lines[:9], *kinds[:-1]])) <= 80
    assert lines[8].split() == kinds[-3].split()
    assert lines[8].startswith("all, and the sum of ranks")
    assert "28 → " in lines[8]
    ranks = [int(line.split("→")[-1].split()[0]) if "→" in line else 4 for line in lines[1:8]]
    assert lines[8].split("→")[1].split()[0] == str(sum(ranks))
    assert 7 < sum(ranks) < 28
    assert lines[-1] == f"written  {tmp_path / 'out'}"
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        state = read_adapter(tmp_path / "out" / name).state
        assert sum(len(value) for key, value in state.items() if "lora_A" in key) == sum(ranks)


def test_every_file_fits_into_the_size(folder: Path, tmp_path: Path) -> None:
    for output in ("out", "out.safetensors"):
        assert main(["adapter", "resize", str(folder), str(tmp_path / output), "--size", "24 kB"]) == 0
    files = [*tmp_path.rglob("*.safetensors")]
    assert len(files) == 3
    assert all(20_000 < file.stat().st_size <= 24_000 for file in files)


def test_an_output_is_kept_unless_it_may_be_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["adapter", "resize", str(folder), str(tmp_path / "out"), "--rank", "2"]
    assert main(command) == 0
    written = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert main([*command[:-1], "1"]) == 2
    assert f"{tmp_path / 'out'} exists; name another output, or set --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == written
    assert main([*command[:-1], "1", "--overwrite"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < len(written)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(["adapter", "resize", str(tmp_path / "half.safetensors"), str(tmp_path / "out"), "--rank", "2"]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out", ["--size", "1 kB"], "size=1.0 kB (1,000 bytes) is too small"),
        ("out", ["--size", "much"], "size='much' is not a byte size"),
        ("out", ["--rank", "8"], "rank=8 is above 4, the highest rank"),
        ("out.safetensors", ["--rank", "2", "--format", "peft"], "is a file, and the format peft is a folder"),
    ],
)
def test_refused(
    output: str, options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "resize", str(folder), str(tmp_path / output), *options]) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_results_wait_on_the_disk(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "SMALL", 0)
    command = ["adapter", "resize", str(folder), str(tmp_path / "new" / "out"), "--rank", "2"]
    with largest_file(20):
        assert main(command) == 2
    assert (
        f"cannot write {tmp_path / 'new'}: File too large; raise the limit of a file's size" in capsys.readouterr().err
    )
    assert not [*(tmp_path / "new").iterdir()]
    assert main(command) == 0
