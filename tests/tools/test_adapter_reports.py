"""``lit-lora adapter info``, ``diff`` and ``check``: screens, JSON and exit status."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lit_lora.cli import main
from lit_lora.formats import write_adapter
from lit_lora.formats.find import read_adapter
from tests.adapter_tools.unet import unet_adapter


@pytest.fixture(scope="module")
def folders(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two LoRAs of a UNet; the second has fewer layers, another rank and no metadata."""
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    names = [name for name, _ in unet.named_modules() if name.endswith(("to_q", "conv_in", "to_out.0"))]
    made = []
    told = {"ss_steps": "12", "modelspec.description": "\x1b[31mred " + "word " * 200}
    for seed, (layers, rank) in enumerate(((names, 4), (names[1:], 3))):
        folder = tmp_path_factory.mktemp("adapter")
        adapter = unet_adapter(unet, layers, {"conv_in": 2} if seed == 0 else None, seed, str(sd_folder), r=rank)
        write_adapter(replace(adapter, metadata=told if seed == 0 else {}), folder)
        made.append(str(folder))
    return made


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    return lines


def test_info(folders: list[str], sd_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "info", folders[0]]) == 0
    lines = shown(capsys)
    assert max(len(line) for line in lines if str(sd_folder.parent.parent) not in line) <= 80
    text = "\n".join(lines)
    for label, value in (("method", "LoRA"), ("format", "peft"), ("family", "StableDiffusion"), ("dtype", "float32")):
        assert f"{label:12}{value}" in lines
    kinds = [line.split() for line in lines if line.startswith("up_blocks.*.atte…")]
    assert [row[1:4] for row in kinds] == [["2", "4", "2"]] * len(kinds)
    assert len(kinds) == 4
    state = read_adapter(folders[0]).state
    assert f"{sum(value.numel() for value in state.values()):,}" in text
    assert "\\x1b[31mred word" in text
    assert main(["adapter", "info", folders[0], "--layers"]) == 0
    assert len([line for line in shown(capsys) if line.startswith("down_blocks.0")]) == 4


def test_metadata_on_the_screen(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tags = {f"tag {number}": number for number in range(22)}
    told = {
        "ss_tag_frequency": json.dumps({"10_dog": tags} | tags),
        "ss_steps": "12",
        "ss_comment": "[1",
        "long": "word " * 30,
    }
    (tmp_path / "told").mkdir()
    write_adapter(replace(read_adapter(folders[0]), metadata=told), tmp_path / "told")
    assert main(["adapter", "info", str(tmp_path / "told")]) == 0
    lines = shown(capsys)
    lines = lines[lines.index("metadata") + 1 :]
    assert [line for line in lines if line.startswith("  ss_")] == [
        "  ss_comment  [1",
        "  ss_steps    12",
        "  ss_tag_frequency",
    ]
    assert [" ".join(["word"] * 13) in line for line in lines[lines.index("  long") :][1:3]] == [True, True]
    after = lines[lines.index("  ss_tag_frequency") + 1 :]
    assert after[0] == "    10_dog"
    assert after[1].startswith('            {"tag 0": 0, "tag 1": 1')
    assert after[-2:] == ["    tag 18  18", "    and 3 more"]


def test_names_of_layers_are_whole_where_they_fit(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns, whole in ((80, False), (120, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["adapter", "info", folders[0]]) == 0
        assert any("…" in line for line in shown(capsys) if line.startswith("up_blocks")) != whole


def test_a_path_stays_whole(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ("long" * 20)
    shutil.copytree(folders[0], folder)
    assert main(["adapter", "info", str(folder)]) == 0
    assert f"{'file':12}{folder}/adapter_model.safetensors" in shown(capsys)


def test_info_as_json(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "info", folders[0], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    file = Path(folders[0]) / "adapter_model.safetensors"
    assert (told["path"], told["bytes"], told["format"]) == (str(file), file.stat().st_size, "peft")
    assert told["layers"][0].keys() == {"part", "name", "parameters", "rank", "alpha", "scale", "norm"}
    assert told["metadata"]["ss_steps"] == "12"


def test_diff(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "diff", *folders]) == 0
    lines = shown(capsys)
    assert max(map(len, lines)) <= 80
    assert lines[: lines.index("")][-2:] == ["1 only in the first adapter", "  conv_in"]
    assert "target_modules" in lines
    total = lines[-1].split()
    assert total[0] == "all"
    assert float(total[-2]) > 0.5
    assert sum("up_blocks.*.atte" in line for line in lines) == 4
    assert main(["adapter", "diff", *folders, "--layers"]) == 0
    each = shown(capsys)
    assert each[-1].split() == total
    assert int(total[1]) == len(each) - each.index("") - 3
    assert main(["adapter", "diff", folders[0], folders[0]]) == 0
    assert shown(capsys) == [f"the adapters are equal: {int(total[1]) + 1} layers"]
    assert main(["adapter", "diff", folders[0], folders[0], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"]["distance"] < 1e-6
    assert told["config"] == {}
    assert all(row["cosine"] == pytest.approx(1) for row in told["layers"].values())


def test_check(folders: list[str], sd_folder: Path, flux_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(read_adapter(folders[0]).state)
    assert main(["adapter", "check", folders[0]]) == 0
    assert capsys.readouterr().out.startswith(
        f"denoiser          {count} tensors fit UNet2DConditionModel of {sd_folder}"
    )
    assert main(["adapter", "check", folders[0], "--base", str(flux_folder)]) == 2
    assert "is an adapter of StableDiffusion" in capsys.readouterr().err
    assert main(["adapter", "check", folders[0], "--base", "embedded"]) == 2
    assert "has the shape (4, 16), and the base needs (4, " in capsys.readouterr().err


def test_check_of_values_that_are_not_finite(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders[0], tmp_path / "bad")
    adapter = read_adapter(tmp_path / "bad")
    state = dict(adapter.state)
    first = min(state)
    state[first] = torch.full_like(state[first], torch.nan)
    write_adapter(replace(adapter, state=state), tmp_path / "bad")
    assert main(["adapter", "check", str(tmp_path / "bad")]) == 2
    assert (
        f"1 tensors of the adapter {tmp_path / 'bad'} hold NaN or Inf, the first is {first}" in capsys.readouterr().err
    )


def test_check_without_a_base(sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    write_adapter(unet_adapter(unet, ["conv_in"], base=""), tmp_path)
    assert main(["adapter", "check", str(tmp_path)]) == 2
    assert "does not tell its base; name one with --base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["merge", "a.adapter"], "adapters: 'a.adapter' is not a list; an argument before or after it may be missing"),
        (["info", "a.adapter", "--x", "1"], "there is no option --x"),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["adapter", *arguments])
    expected = f"lit-lora: error\n{sentence}; lit-lora adapter {arguments[0]} --help shows all arguments\n"
    assert capsys.readouterr().err == expected


def test_values_of_other_types(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["resize", "a", "b", "--rank", "two"], "rank: 'two' is not"),
        (["convert", "a", "b", "--format", "nothing"], "format: 'nothing' is none of peft, diffusers"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["adapter", *arguments])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert lines[1].startswith(sentence)
