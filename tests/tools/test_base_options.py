"""``lit-lora sample`` and the model card load the files of the base that an adapter was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, StableDiffusion
from lit_lora.formats.find import read_adapter
from lit_lora.tools.drawing import Drawer, ScaledAdapter
from tests.helpers import save_adapter

WEIGHTS = "diffusion_pytorch_model"


def adapter_of(family: ModelFamily, folder: Path) -> Path:
    """An adapter of a base that was just loaded."""
    family.load(torch.float32, without={"vae", "text"})
    family.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    folder.mkdir()
    save_adapter(family, folder)
    return folder


def drawn_with(base: Path | None, adapter: Path, **options: str) -> Any:
    """The family that ``lit-lora sample`` draws with."""
    named = None if base is None else str(base)
    common: dict[str, Any] = {"family": None, "dtype": "float32", "device": "cpu", "sizes": [(16, 16)]}
    drawer = Drawer(named, base_options=options, **common)
    drawer.adapt([ScaledAdapter(str(adapter))])
    return drawer.family


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{WEIGHTS}.safetensors")


@pytest.fixture
def folder(sd_folder: Path, tmp_path: Path) -> Path:
    """A base whose weights are all of the variant fp16."""
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    return folder


def test_the_variant_of_the_training(folder: Path, tmp_path: Path) -> None:
    """Also if there are files without a variant by now."""
    adapter = adapter_of(StableDiffusion(str(folder)), tmp_path / "adapter")
    card = (adapter / "README.md").read_text()
    assert card.count(f'StableDiffusionPipeline.from_pretrained("{folder}", variant="fp16")') == 2
    for file in folder.rglob("*.safetensors"):
        changed = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
        save_file(changed, file.with_name(file.name.replace(".fp16", "")), {"format": "pt"})
    for base, variant in ((None, "fp16"), (folder, "fp16")):
        family = drawn_with(base, adapter)
        assert family.source.variant == variant
        assert family.denoiser.conv_in.weight.any()
        assert family.vae.encoder.conv_in.weight.any()
    for file in folder.rglob("*.fp16.safetensors"):
        file.rename(file.with_name(file.name.replace("fp16", "bf16")))
    assert drawn_with(None, adapter, variant="bf16").source.variant == "bf16"
    shutil.move(folder, tmp_path / "moved")  # another base, whose files the adapter does not know
    assert drawn_with(tmp_path / "moved", adapter).source.variant is None


def test_the_revision_of_the_training(sd_folder: Path, tmp_path: Path) -> None:
    family = StableDiffusion(str(sd_folder), revision="v1")
    adapter = read_adapter(adapter_of(family, tmp_path / "adapter"))
    assert adapter.config["revision"] == "v1"  # where PEFT looks for it
    assert f'from_pretrained("{sd_folder}", revision="v1")' in (tmp_path / "adapter" / "README.md").read_text()
    assert drawn_with(None, tmp_path / "adapter").source.revision == "v1"


def test_a_damaged_entry(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(StableDiffusion(str(folder)), tmp_path / "adapter") / "adapter_model.safetensors"
    save_file(load_file(adapter), adapter, {"lit_lora.base": "[1"})
    with pytest.raises(UserError, match=r"'lit_lora\.base' is damaged"):
        drawn_with(folder, adapter)


def test_the_vae_of_the_training(sd_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    vae = str(sdxl_folder)
    adapter = adapter_of(StableDiffusion(str(sd_folder), vae=vae), tmp_path / "adapter")
    family = drawn_with(None, adapter)
    assert torch.equal(family.vae.encoder.conv_in.weight, weights_of(sdxl_folder / "vae")["encoder.conv_in.weight"])
    card = (adapter / "README.md").read_text()
    code = card.split("In diffusers:\n\n```python\n")[1].split("```")[0].replace('"this folder"', f'"{adapter}"')
    names: dict[str, Any] = {}
    exec(code.partition("image =")[0], names)  # the card's own way
    assert torch.equal(names["pipeline"].vae.encoder.conv_in.weight, family.vae.encoder.conv_in.weight)
    assert drawn_with(None, adapter, vae=str(sd_folder / "vae")).source.vae == str(sd_folder / "vae")


def test_a_vae_for_a_base_of_no_known_family(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    index = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(index.replace("StableDiffusionPipeline", "StableDiffusionPAGPipeline"))
    adapter = adapter_of(StableDiffusion(str(sd_folder)), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"vae needs a known model family, .* is of none; name it with --family"):
        drawn_with(folder, adapter, vae=str(sd_folder))
