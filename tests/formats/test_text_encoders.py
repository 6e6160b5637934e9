"""Adapters of text encoders, under the names of each version of transformers, in sampling and in diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn

from lit_lora.adapters import load_adapter
from lit_lora.cli import main
from lit_lora.families import Flux, ModelFamily, StableDiffusion, StableDiffusion3, StableDiffusionXL
from lit_lora.formats import AdapterFiles, format_named
from lit_lora.formats.find import read_adapter
from lit_lora.formats.layer_names import places
from lit_lora.formats.text_encoders import for_encoder
from tests.formats.adapters import FAMILIES, encoder_adapter, loaded, trained

WIDTHS = {"text_encoder": 16, "text_encoder_2": 24}


def with_encoders(fixture: str, folder: Path) -> AdapterFiles:
    """An adapter of the denoiser and of all CLIP encoders."""
    adapter = trained(loaded(FAMILIES[fixture], folder), LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    names = [name for name in FAMILIES[fixture].kohya_encoders if name in WIDTHS]
    if FAMILIES[fixture] is Flux:
        names.remove("text_encoder_2")
    return replace(adapter, text_encoders={name: encoder_adapter(WIDTHS[name]) for name in names})


def delta(adapter: AdapterFiles) -> Tensor:
    down, up = (next(value for key, value in adapter.state.items() if f"lora_{letter}" in key) for letter in "AB")
    return up @ down * adapter.config["lora_alpha"] / adapter.config["r"]


def out_proj(encoder: nn.Module) -> Tensor:
    found = [
        value for key, value in encoder.state_dict().items() if "layers.1.self_attn.out_proj" in key and "weight" in key
    ]
    (weight,) = [value for value in found if value.shape[0] == value.shape[1]]
    return weight


@pytest.mark.parametrize("fixture", FAMILIES)
def test_each_encoder_gets_its_own_adapter(fixture: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    adapter = with_encoders(fixture, folder)
    for name in ("kohya", "comfyui", "lycoris", "peft", "diffusers"):
        (tmp_path / name).mkdir()
        format_named(name).write(adapter, tmp_path / name)
        read = read_adapter(tmp_path / name)
        assert read.text_encoders.keys() == adapter.text_encoders.keys()
        family = loaded(FAMILIES[fixture], folder)
        family._load_part("text")
        for part, one in read.text_encoders.items():
            encoder = family.encoders[part]
            before = out_proj(encoder).clone()
            fitting = for_encoder(one, encoder)
            merged: Any = load_adapter(encoder, fitting.config, fitting.state, part).merge_and_unload()
            assert torch.allclose(out_proj(merged) - before, delta(adapter.text_encoders[part]), atol=1e-5)


@pytest.mark.parametrize("name", ["diffusers", "kohya"])
@pytest.mark.parametrize("fixture", ["sd_folder", "sdxl_folder"])
def test_diffusers_loads_them(fixture: str, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    adapter = with_encoders(fixture, folder)
    one = format_named(name)
    one.write(adapter, tmp_path)
    family = loaded(FAMILIES[fixture], folder)
    with family.all_parts():
        pipeline: Any = family.pipeline()
        before = {part: out_proj(getattr(pipeline, part)).clone() for part in adapter.text_encoders}
        pipeline.load_lora_weights(str(tmp_path), weight_name=one.file_name)
        pipeline.fuse_lora(components=list(adapter.text_encoders))
        for part, contents in adapter.text_encoders.items():
            assert torch.allclose(out_proj(getattr(pipeline, part)) - before[part], delta(contents), atol=1e-5)


def test_diffusers_loads_magnitudes_of_an_encoder(sd_folder: Path, tmp_path: Path) -> None:
    """Transformers leaves those under PEFT's own name as they are in the base."""
    adapter = with_encoders("sd_folder", sd_folder)
    lora = adapter.text_encoders["text_encoder"]
    (layer,) = {key.partition(".lora_")[0] for key in lora.state}
    magnitude = {f"{layer}.lora_magnitude_vector": torch.linspace(1, 3, WIDTHS["text_encoder"])}
    dora = replace(lora, state=lora.state | magnitude, config=lora.config | {"use_dora": True})
    written = replace(adapter, text_encoders={"text_encoder": dora})
    format_named("diffusers").write(written, tmp_path)
    read = read_adapter(tmp_path / "pytorch_lora_weights.safetensors").text_encoders["text_encoder"]
    assert read.state.keys() == dora.state.keys()
    ids = torch.arange(3, 10)[None]
    pipeline, plain = (StableDiffusionPipeline.from_pretrained(sd_folder) for _ in range(2))
    pipeline.load_lora_weights(tmp_path)
    fitting = for_encoder(dora, plain.text_encoder)
    with torch.no_grad():
        found, base = pipeline.text_encoder(ids)[0], plain.text_encoder(ids)[0]
        expected = load_adapter(plain.text_encoder, fitting.config, fitting.state, "adapter")(ids)[0]
    torch.testing.assert_close(found, expected)
    assert (expected - base).abs().max() > 0.1


def test_samples_are_drawn_with_adapted_encoders(sd_folder: Path, tmp_path: Path) -> None:
    adapter = with_encoders("sd_folder", sd_folder)
    drawn = ["--prompts", "a star", "--steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]
    images = {}
    for name, contents in (("kohya", adapter), ("peft", adapter), ("comfyui", replace(adapter, text_encoders={}))):
        (tmp_path / name).mkdir()
        format_named(name).write(contents, tmp_path / name)
        out = tmp_path / f"{name}.png"
        arguments = ["--adapter", str(tmp_path / name), "--base", str(sd_folder), "--out", str(out)]
        assert main(["sample", *arguments, *drawn]) == 0
        with Image.open(out) as image:
            images[name] = image.tobytes()
    assert images["kohya"] == images["peft"]
    assert images["kohya"] != images["comfyui"]


def test_a_base_without_the_encoder(
    sd_folder: Path, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(loaded(StableDiffusion, sd_folder), LoraConfig(r=2, target_modules=["to_q"]))
    format_named("peft").write(replace(adapter, text_encoders={"text_encoder_2": encoder_adapter(24)}), tmp_path)
    assert main(["sample", "--adapter", str(tmp_path), "--prompts", "a", "--device", "cpu"]) == 2
    assert "changes text_encoder_2, which the base does not have" in capsys.readouterr().err


def test_families_know_their_encoders() -> None:
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux):
        assert family.kohya_encoders.keys() <= family.encoder_classes.keys()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (StableDiffusion, {"clip_l": "text_encoder", "clip_h": "text_encoder"}),
        (StableDiffusionXL, {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}),
        (Flux, {"clip_l": "text_encoder", "clip_h": "text_encoder", "t5xxl": "text_encoder_2"}),
    ],
)
def test_names_of_encoders_in_files_of_comfyui(family: type[ModelFamily], expected: dict[str, str]) -> None:
    names = {name: place.part for name, place in places(family, {}).items() if name.startswith("text_encoders.")}
    assert {name.split(".")[1]: part for name, part in names.items()} == expected
