"""``lit-lora sample`` with bases of each family in each precision, and with a base of no known family."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_lora import __version__
from lit_lora.cli import main
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.formats import write_adapter
from lit_lora.formats.find import read_adapter
from lit_lora.formats.quantized_base import quantized_metadata
from lit_lora.quantization import NF4
from lit_lora.tools import run_tool
from lit_lora.tools.sample import SampleOptions, sample_arguments
from lit_lora.tools.sampling import _next, columns_of
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


def test_a_file_of_prompts_has_the_images_to_edit(
    flux_kontext_folder: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for color in ("black", "white"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
    prompts = [f"- {{prompt: edit, seed: 3, image: {color}.png}}" for color in ("black", "white", "black")]
    (tmp_path / "p.yaml").write_text("\n".join(prompts))
    given = ["--prompts", str(tmp_path / "p.yaml"), *DRAWN[2:], "--out", str(tmp_path / "out")]
    assert main(["sample", "--base", str(flux_kontext_folder), "--family", "FluxKontext", *given]) == 0
    black, white, again = (np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").iterdir()))
    assert np.array_equal(black, again)
    assert not np.array_equal(black, white)
    assert main(["sample", "--base", str(sd_folder), *given]) == 2
    assert "a prompt has an image to edit, and StableDiffusion draws from text alone" in capsys.readouterr().err


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
        ("no weights", "does not exist; name a safetensors file"),
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


def test_nothing_is_drawn_where_a_later_adapter_is_missing(
    adapter: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--adapter", str(adapter), str(tmp_path / "gone.safetensors")]
    assert main(["sample", "--base", str(sd_folder), *given, "--out", str(tmp_path / "drawn.png"), *DRAWN]) == 2
    printed = capsys.readouterr()
    assert "gone.safetensors does not exist" in printed.err
    assert "drawing" not in printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps=0 is too small"),
        (["--count", "0"], "count=0 is too small"),
        (["--columns", "0"], "columns=0 is too small"),
        (["--seed", "-1"], "seed=-1 is too small"),
        (["--seed", str(2**63)], "seed=9223372036854775808 is too large"),
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


def grid_of(folder: Path, out: Path, *options: str) -> Image.Image:
    assert main(["sample", "--base", str(folder), "--out", str(out), *DRAWN, *options]) == 0
    with Image.open(out) as image:
        image.load()
        return image


def scaled(adapter: Path, folder: Path, factor: float) -> Path:
    """The adapter with another update."""
    shutil.copytree(adapter, folder)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = {name: value * factor if "_B" in name else value for name, value in load_file(file).items()}
        save_file(tensors, file, metadata)
    return folder


@pytest.fixture(scope="module")
def strong(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose update is seen, since that of a new one is zero."""
    folder = tmp_path_factory.mktemp("strong") / "strong"
    shutil.copytree(adapter, folder)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = {name: torch.randn_like(value) for name, value in load_file(file).items()}
        save_file(tensors, file, metadata)
    return folder


def test_adapters_and_scales_are_compared_over_one_base(
    strong: Path, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each column is what the adapter draws by itself, and 0 is the base."""
    loads: list[str] = []
    load = StableDiffusion.load
    monkeypatch.setattr(StableDiffusion, "load", lambda self, *a, **o: (loads.append("x"), load(self, *a, **o))[1])
    other = scaled(strong, tmp_path / "other", 0.25)
    compared = ["--adapter", str(strong), str(other), "--scales", "0", "1", "0.25"]
    assert main(["sample", "--base", str(sd_folder), "--out", str(tmp_path / "out"), *DRAWN, *compared]) == 0
    assert loads == ["x"]
    names = ["00-base", "01-strong_scale_1", "02-strong_scale_0.25", "03-other_scale_1", "04-other_scale_0.25"]
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [path.stem for path in files] == [f"0000-{name}" for name in names]
    base, first, weak, second, _ = [Image.open(path).tobytes() for path in files]
    alone = [
        grid_of(sd_folder, tmp_path / f"{i}.png", *options).tobytes()
        for i, options in enumerate(
            ([], ["--adapter", str(strong)], ["--adapter", str(strong), "--scales", "0.25"], ["--adapter", str(other)])
        )
    ]
    assert [base, first, weak, second] == alone
    assert len({base, first, weak}) == 3
    assert np.abs(pixels(weak) - pixels(second)).max() <= 1  # B is scaled in one, the update in the other


def pixels(image: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(image, np.uint8).astype(int)


def test_combined_adapters_draw_as_one_of_the_sum(strong: Path, sd_folder: Path, tmp_path: Path) -> None:
    other = scaled(strong, tmp_path / "other", 0.5)
    combined = ["--adapter", str(strong), str(other), "--combine", "--scales", "0.5", "0.5"]
    together = pixels(grid_of(sd_folder, tmp_path / "a.png", *combined).tobytes())
    single = ["--adapter", str(strong), "--scales", "0.75"]
    assert np.abs(together - pixels(grid_of(sd_folder, tmp_path / "b.png", *single).tobytes())).max() <= 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"lit_lora.scheduler": '{"prediction_type": "v_prediction"}'},
            "need other changes of the base's scheduler, none for",
        ),
        (
            {"lit_lora.base": '{"pretrained_model_name_or_path": BASE, "vae": "x"}'},
            "give those to draw with, such as --vae",
        ),
    ],
)
def test_adapters_that_need_different_things_are_not_combined(
    entry: dict[str, str],
    message: str,
    strong: Path,
    sd_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = scaled(strong, tmp_path / "other", 0.5)
    entry = {name: value.replace("BASE", json.dumps(str(sd_folder))) for name, value in entry.items()}
    for file in other.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        save_file(load_file(file), file, metadata | entry)
    both = ["--adapter", str(strong), str(other), "--combine"]
    command = ["sample", "--base", str(sd_folder), "--out", str(tmp_path / "out"), *DRAWN]
    assert main([*command, *both]) == 2
    assert message in capsys.readouterr().err
    assert not [*(tmp_path / "out").glob("*.png")]


def test_files_hold_what_they_were_drawn_with(strong: Path, sd_folder: Path, tmp_path: Path) -> None:
    entries = tmp_path / "prompts.yaml"
    entries.write_text("- {prompt: 'a star, ☆', negative_prompt: blurry, seed: 7, width: 64, steps: 1}\n- a heart\n")
    common = [
        "sample",
        "--base",
        str(sd_folder),
        "--adapter",
        str(strong),
        "--scales",
        "0.5",
        "--prompts",
        str(entries),
    ]
    common += [
        "--steps",
        "2",
        "--height",
        "32",
        "--width",
        "32",
        "--scheduler",
        "EulerDiscreteScheduler",
        "--seed",
        "3",
    ]
    text = (
        "a star, ☆\nNegative prompt: blurry\nSteps: 1, Sampler: EulerDiscreteScheduler, CFG scale: 5.0, Seed: 7, Size: 64x32, "
        f'Model: {sd_folder}, Adapters: "{strong}: 0.5", Version: lit-lora {__version__}'
    )
    for ending in ("png", "jpg", "webp"):
        out = tmp_path / ending
        assert main([*common, "--out", str(out), "--format", ending]) == 0
        assert sorted(path.name for path in out.glob("[0-9]*")) == [f"0000.{ending}", f"0001.{ending}"]
        with Image.open(out / f"0000.{ending}") as image:
            assert image.size == (64, 32)
            comment = image.getexif().get_ifd(0x8769).get(0x9286, b"")
            assert (image.text["parameters"] if ending == "png" else comment[8:].decode("utf-16-be")) == text  # type: ignore[attr-defined]
    assert main([*common, "--out", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        first, second = grid.text["parameters"].split("\n\n")  # type: ignore[attr-defined]
    assert first == text
    assert "a heart\nSteps: 2, " in second
    assert "Seed: 4, Size: 32x32" in second


def test_a_folder_with_earlier_images_is_told(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "drawn"
    command = ["sample", "--base", str(sd_folder), "--out", str(out), *DRAWN]
    assert main([*command, "--count", "3"]) == 0
    assert capsys.readouterr().out == f"3 images: {out}\n"
    assert main(command) == 0
    assert capsys.readouterr().out == f"1 image: {out}, in place of 1 of that name, beside 2 that were there\n"
    (file := tmp_path / "samples.png").touch()
    assert main(["sample", "--base", str(sd_folder), "--out", str(file), *DRAWN]) == 0
    assert capsys.readouterr().out == f"1 image: {file}, in place of 1 of that name\n"


def test_a_negative_prompt_changes_the_image(sd_folder: Path, tmp_path: Path) -> None:
    plain = grid_of(sd_folder, tmp_path / "a.png").tobytes()
    assert grid_of(sd_folder, tmp_path / "b.png", "--negative_prompt", "a heart").tobytes() != plain


def test_the_variant_of_a_base_of_no_known_family_is_found(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPAGPipeline"}))
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert main(["sample", "--base", str(folder), "--out", str(tmp_path / "drawn.png"), *DRAWN]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "one", "one"], "the adapter one is given more than once"),
        (["--adapter", "one", "./one"], "the adapter ./one is given more than once"),
        (["--adapter", "one", "--combine"], "--combine needs several adapters, and there is 1"),
        (["--adapter", "one", "two", "--combine", "--scales", "1", "2", "3"], "2 are given, and 3 scales"),
        (["--scales", "0.5"], "scales are factors of adapters, and there is none"),
        (["--scheduler", "NoScheduler"], "scheduler='NoScheduler' cannot take the place of the base's"),
        (["--negative_prompt", "b", "--guidance_scale", "1"], "draws without classifier-free guidance"),
        (["--guidance_rescale", "0.7", "--guidance_scale", "1"], "guidance_rescale=0.7 has no effect without guidance"),
        (["--format", "webp"], "format='webp' is for the files in a folder, and out="),
    ],
)
def test_a_wrong_choice_is_one_error(
    options: list[str], message: str, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "drawn.png"
    assert main(["sample", "--base", str(sd_folder), "--out", str(out), *DRAWN, *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_link_is_compared_and_not_combined_with_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "step=2.adapter").mkdir()
    (tmp_path / "last.adapter").symlink_to("step=2.adapter")
    options = SampleOptions([str(tmp_path / name) for name in ("step=2.adapter", "last.adapter")], prompts="a")
    assert len(columns_of(options)) == 2
    with pytest.raises(UserError, match=r"last.adapter is given more than once"):
        columns_of(replace(options, combine=True))


def test_the_next_command_of_an_adapter(strong: Path) -> None:
    one = SampleOptions(adapter=str(strong), prompts=["a star", "it's blue"])
    assert _next(one, columns_of(one)).splitlines() == [
        "",
        "Next:",
        "lit-lora sample --scales 0 0.5 1 --out scales.png \\",
        """  --prompts 'a star' 'it'"'"'s blue' \\""",
        f"  --adapter {strong}",
    ]
    settings = replace(
        one, seed=7, steps=4, height=64, negative_prompt="it's dark", base_adapters=["a b"], columns=2, out="x"
    )
    assert _next(settings, columns_of(settings)).splitlines()[4:] == [
        """  --negative_prompt 'it'"'"'s dark' \\""",
        "  --seed 7 \\",
        "  --steps 4 \\",
        "  --height 64 \\",
        """  --base_adapters '["a b"]' \\""",
        f"  --adapter {strong}",
    ]
    words = shlex.split(_next(settings, columns_of(settings)).replace("\\\n", "").partition("lit-lora sample ")[2])
    read = run_tool(SampleOptions, sample_arguments(words), "lit-lora sample", return_instance=True)
    assert read == replace(settings, scales=[0, 0.5, 1], out="scales.png", columns=4)
    dashes = replace(one, prompts=["-5 degrees"], negative_prompt="- blur")
    words = shlex.split(_next(dashes, columns_of(dashes)).replace("\\\n", "").partition("lit-lora sample ")[2])
    read = run_tool(SampleOptions, sample_arguments(words), "lit-lora sample", return_instance=True)
    assert read == replace(dashes, prompts="-5 degrees", scales=[0, 0.5, 1], out="scales.png")
    several = replace(one, scales=[0, 1])
    assert _next(several, columns_of(several)).splitlines()[2:] == [
        "lit-lora adapter convert --format kohya \\",
        f"  {strong} \\",
        f"  {strong.stem}.safetensors",
    ]
    base = SampleOptions(base="embedded", prompts="a star")
    assert _next(base, columns_of(base)) == ""


def test_names_tell_adapters_apart() -> None:
    options = SampleOptions(["a/last.adapter", "b/last.adapter", "c/x.safetensors"], prompts="a", scales=[1, 0.5])
    names = [
        "a/last, scale 1",
        "a/last, scale 0.5",
        "b/last, scale 1",
        "b/last, scale 0.5",
        "c/x, scale 1",
        "c/x, scale 0.5",
    ]
    assert [column.name for column in columns_of(options)] == names
    assert [column.name for column in columns_of(replace(options, scales=None))] == ["a/last", "b/last", "c/x"]


def test_of_a_checkpoint_the_folder_beside_it_is_taken(tmp_path: Path) -> None:
    (tmp_path / "last.adapter").mkdir()
    paths = [str(tmp_path / name) for name in ("last.ckpt", "alone.ckpt")]
    columns = columns_of(SampleOptions(paths, prompts="a"))
    assert [column.adapters[0].path for column in columns] == [str(tmp_path / "last.adapter"), paths[1]]


def test_several_values_of_an_option_are_a_list() -> None:
    given = ["--adapter", "a", "b", "--scales", "0", "-0.5", "--combine", "--prompts", "x", "--seed", "3"]
    made = sample_arguments([*given, "--combine", "false"])
    expected = ["--adapter", '["a", "b"]', "--scales", "[0, -0.5]", "--combine=true", "--prompts", "x", "--seed", "3"]
    assert made == [*expected, "--combine", "false"]
    assert sample_arguments(["--prompts", "1", "2"]) == ["--prompts", '["1", "2"]']
