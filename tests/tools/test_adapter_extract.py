"""``lit-lora adapter extract``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lit_lora.cli import main
from lit_lora.formats.find import read_adapter


def test_the_screen(sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    generator = torch.Generator().manual_seed(4)
    for name, weight in unet.named_parameters():
        if "to_q" in name or "bias" in name:
            weight.data += torch.randn(weight.shape, generator=generator) / 5
    unet.save_pretrained(tmp_path / "tuned")
    command = ["adapter", "extract", str(tmp_path / "tuned"), str(sd_folder), str(tmp_path / "out"), "--rank", "3"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    state = read_adapter(tmp_path / "out").state
    rows = [line.split() for line in lines[1 : lines.index("")]]
    assert sum(int(row[1]) for row in rows) == 8 > len(rows)
    assert {row[2] for row in rows} == {"3"}
    assert len(state) == 16
    biases = sum("bias" in name for name, _ in unet.named_parameters())
    assert f"{biases} changed weights are not in the adapter" in "\n".join(lines)
    assert lines[-2] == f"  and {biases - 10} more"
    assert main([*command, "--energy", "0.5", "--overwrite"]) == 2
    assert "give one of rank, energy and size" in capsys.readouterr().err
