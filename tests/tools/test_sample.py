"""``lit-lora sample`` with bases of each family in each precision, and with a base of no known family."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from lit_lora.cli import main
from lit_lora.families import StableDiffusion
from lit_lora.formats import write_adapter
from lit_lora.formats.find import read_adapter
from lit_lora.formats.quantized_base import quantized_metadata
from lit_lora.quantization import NF4
from tests.families.folders import FOLDERS
from tests.helpers import save_adapter

DRAWN = ["--prompts", "a star", "--steps", "2", "--height", "32", "--width", "32", "--device", "cpu"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fixture", FOLDERS.values())
def test_draws_in_each_precision(fixture: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also where the VAE keeps a dtype of its own."""
    folder = request.getfixturevalue(fixture)
    out = tmp_path / "drawn.png"
    assert main(["sample", "--base", str(folder), "--dtype", dtype, "--out", str(out), *DRAWN]) == 0
    assert out.stat().st_size > 0


def test_a_base_of_no_known_family(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPAGPipeline"}))
    assert main(["sample", "--base", str(folder), "--out", str(tmp_path / "drawn.png"), *DRAWN]) == 0


def test_a_size_that_does_not_fit_is_refused_before_weights_are_read(
    flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(flux_folder, folder)
    for file in [*folder.rglob("*.safetensors")]:
        file.unlink()
    assert main(["sample", "--base", str(folder), "--prompts", "a", "--height", "18"]) == 2
    assert "sides are multiples of 4 px, not 18 x" in capsys.readouterr().err


def test_a_family_that_cannot_be_imported(sd_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family, message in (("no_such.Family", "cannot be imported"), ("LoraDiffusion", "is not a subclass of")):
        assert main(["sample", "--base", str(sd_folder), "--family", family, *DRAWN]) == 2
        assert message in capsys.readouterr().err


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from lit_lora.cli import main
        assert main(["sample", "--help"]) == 0
        assert "torch" not in sys.modules
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)


@pytest.fixture(scope="module")
def adapter(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter of the tiny base."""
    folder = tmp_path_factory.mktemp("adapter")
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32)
    family.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    save_adapter(family, folder)
    return folder


def spoil(kind: str, folder: Path) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "no config":
        config.unlink()
    elif kind == "config":
        config.write_text("{")
    elif kind in ("method", "no method", "rank"):
        values = json.loads(config.read_text())
        values |= {"method": {"peft_type": "NONSENSE"}, "no method": {"peft_type": None}, "rank": {"r": 4}}[kind]
        config.write_text(json.dumps(values))
    else:
        tensors = load_file(weights)
        first, *_ = tensors
        if kind == "nan":
            tensors[first][0, 0] = float("nan")
        elif kind == "half":
            del tensors[first]
        elif kind == "unknown":
            tensors["base_model.model.nowhere.lora_A.weight"] = torch.zeros(1)
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no weights", "cannot read"),
        ("truncated", "cannot read"),
        ("empty", "cannot read"),
        ("no config", "is not an adapter folder|is no adapter folder"),
        ("config", "is not an adapter folder|is no adapter folder"),
        ("method", "does not fit UNet2DConditionModel"),
        ("no method", "does not fit UNet2DConditionModel"),
        ("rank", "does not fit UNet2DConditionModel: .*size mismatch"),
        ("nan", "1 tensors of the adapter .* hold NaN or Inf"),
        ("half", "misses 1 tensors, the first is base_model"),
        ("unknown", "has unknown 1 tensors, the first is base_model.model.nowhere"),
    ],
)
def test_a_bad_adapter_is_one_error(
    kind: str, message: str, adapter: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(adapter, folder)
    spoil(kind, folder)
    out = tmp_path / "drawn.png"
    assert main(["sample", "--base", str(sd_folder), "--adapter", str(folder), "--out", str(out), *DRAWN]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("lit-lora: error\n")
    assert re.search(message, printed), printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps=0 is too small"),
        (["--count", "0"], "count=0 is too small"),
        (["--columns", "0"], "columns=0 is too small"),
        (["--seed", "-1"], "seed=-1 is too small"),
        (["--height", "17"], "17"),
        (["--device", "cuda"], "device='cuda' cannot be used here"),
        (["--device", "abacus"], "device='abacus' cannot be used here"),
        (["--out", "x.bmp"], "out='x.bmp' has an ending that is not known; use .png, .jpg, .jpeg, .webp"),
        (["--prompts", "b"], "--prompts is given more than once"),
    ],
)
def test_a_wrong_option_is_one_error(
    options: list[str], message: str, sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ["--prompts", "a", "--steps", "2"] if "--steps" not in options else ["--prompts", "a"]
    assert main(["sample", "--base", str(sd_folder), *drawn, *options]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("lit-lora: error\n")
    assert message in printed


def test_an_adapter_for_another_quantization_is_told(adapter: Path, sd_folder: Path, tmp_path: Path) -> None:
    files = read_adapter(adapter)
    folder = tmp_path / "quantized"
    folder.mkdir()
    write_adapter(replace(files, metadata=quantized_metadata(NF4(block_size=16))), folder)
    drawn = ["sample", "--base", str(sd_folder), "--out", str(tmp_path / "drawn.png"), *DRAWN]
    told = r"quantized was made for the base quantized by NF4\(block_size=16, .* would come twice on the base in full precision"
    with pytest.warns(UserWarning, match=told):
        assert main([*drawn, "--adapter", str(folder)]) == 0
    assert main([*drawn, "--adapter", str(adapter)]) == 0  # a warning would be an error


@pytest.mark.parametrize(("ending", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_a_file_holds_what_its_name_says(
    ending: str, kind: str, adapter: Path, sd_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"drawn.{ending}"
    assert main(["sample", "--base", str(sd_folder), "--adapter", str(adapter), "--out", str(out), *DRAWN]) == 0
    with Image.open(out) as image:
        assert image.format == kind


def test_a_base_that_is_not_finite_is_an_error_and_no_black_image(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    (file,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["sample", "--base", str(folder), "--out", str(tmp_path / "drawn.png"), *DRAWN]) == 2
    assert "holds NaN: the weights of base or adapter are NaN or Inf" in capsys.readouterr().err
    assert not (tmp_path / "drawn.png").exists()
