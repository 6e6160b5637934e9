"""``lit-lora adapter convert`` between file formats."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from peft import LoHaConfig, LoraConfig

from lit_lora.cli import main
from lit_lora.formats import FORMATS, write_adapter
from lit_lora.formats.find import read_adapter
from lit_lora.tools.adapter_convert import Format
from tests.formats.test_formats import adapter_for, same


@pytest.fixture(scope="module")
def peft_folder(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    write_adapter(adapter_for(sd_folder, LoraConfig(r=2, lora_alpha=4)), folder)
    (folder / "pytorch_lora_weights.safetensors").unlink()
    return folder


def test_the_option_knows_every_format() -> None:
    assert get_args(Format) == tuple(one.name for one in FORMATS)


def test_there_and_back(peft_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "new" / "star.safetensors", tmp_path / "back"
    assert main(["adapter", "convert", str(peft_folder), str(file), "--format", "diffusers"]) == 0
    assert capsys.readouterr().out == f"diffusers: {file}\n"
    assert [path.name for path in file.parent.iterdir()] == ["star.safetensors"]
    assert main(["adapter", "convert", str(file), str(folder), "--format", "peft"]) == 0
    same(read_adapter(folder), read_adapter(peft_folder))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (peft_folder / name).read_bytes()
    for source, target in ((file, folder), (folder, file)):
        before = target.stat().st_mtime_ns
        command = [
            "adapter",
            "convert",
            str(source),
            str(target),
            "--format",
            "peft" if target == folder else "diffusers",
        ]
        assert main(command) == 2
        assert f"{target} exists; name another output, or set --overwrite" in capsys.readouterr().err
        assert target.stat().st_mtime_ns == before
        assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("x.safetensors", ["--format", "peft"], "is a file, and the format peft is a folder"),
        (
            "x.bin",
            [],
            "has the ending .bin, and adapters are written as files with the ending .safetensors, or folders",
        ),
        ("x", ["--format", "diffusers", "--family", "Nobody"], "no attribute 'Nobody'; choose from Chroma, Flux,"),
        (".", ["--format", "diffusers", "--overwrite"], "exists and holds other files"),
    ],
)
def test_wrong_options(
    output: str,
    options: list[str],
    message: str,
    peft_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other.txt").touch()
    assert main(["adapter", "convert", str(peft_folder), str(tmp_path / output), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_method_that_the_format_does_not_hold(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write_adapter(adapter_for(sd_folder, LoHaConfig(r=2, alpha=2)), tmp_path / "in")
    assert main(["adapter", "convert", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "diffusers"]) == 2
    assert "it holds LoRA, and this is LOHA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
