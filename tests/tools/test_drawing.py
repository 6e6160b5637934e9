"""What adapters are drawn with a scale, and in which dtype they are merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftConfig
from peft.tuners.lora import LoraLayer

from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.formats import write_adapter
from lit_lora.tools.drawing import Drawer, ScaledAdapter
from tests.formats.adapters import loaded, trained

LORA = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])


def written(config: PeftConfig, sd_folder: Path, folder: Path) -> str:
    folder.mkdir()
    write_adapter(trained(loaded(StableDiffusion, sd_folder), config), folder)
    return str(folder)


def drawer(dtype: str = "float32") -> Drawer:
    return Drawer(None, family=None, dtype=dtype, device="cpu", sizes=[(16, 16)])


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["to_out.0"], bias="all"),
        LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"]),
        OFTConfig(r=0, oft_block_size=4, target_modules=["to_q"]),
    ],
)
def test_an_update_without_a_scale_is_not_drawn_as_if_it_had_one(
    config: PeftConfig, sd_folder: Path, tmp_path: Path
) -> None:
    path = written(config, sd_folder, tmp_path / "adapter")
    drawer().adapt([ScaledAdapter(path, 1)])
    with pytest.raises(UserError, match=r"has no scale; draw it with the scale 1, or with 0 for the base alone"):
        drawer().adapt([ScaledAdapter(path, 0.5)])


def test_layers_with_an_alpha_of_zero_have_a_scale(sd_folder: Path, tmp_path: Path) -> None:
    """Other programs write such files; half of no update is none."""
    path = tmp_path / "adapter"
    written(LORA, sd_folder, path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"attn1.to_q": 0}}))
    used = drawer()
    used.adapt([ScaledAdapter(str(path), 0.5)])
    assert used.family is not None
    layers = [layer for layer in used.family.denoiser.modules() if isinstance(layer, LoraLayer)]
    scales = {layer.scaling["default"] for layer in layers}
    assert scales == {0, 0.5 * LORA.lora_alpha / LORA.r}


def test_rounding_of_merged_adapters_is_told(sd_folder: Path, tmp_path: Path) -> None:
    path = written(LORA, sd_folder, tmp_path / "adapter")
    other = written(LoraConfig(r=1, target_modules=["to_v"]), sd_folder, tmp_path / "other")
    with pytest.warns(
        UserWarning, match=r"rounding the base to bfloat16 adds an error of \d+% to the change by adapter"
    ):
        drawer("bfloat16").adapt([ScaledAdapter(path, 1e-3), ScaledAdapter(other, 1e-3)])
    for dtype, scale in (("bfloat16", 1), ("float32", 1e-3)):  # warnings are errors
        drawer(dtype).adapt([ScaledAdapter(path, scale), ScaledAdapter(other, scale)])


def test_one_adapter_is_not_merged(sd_folder: Path, tmp_path: Path) -> None:
    used = drawer("bfloat16")
    used.adapt([ScaledAdapter(written(LORA, sd_folder, tmp_path / "adapter"), 1e-3)])
    assert used.family is not None
    weight = used.family.denoiser.get_parameter(
        next(n for n, _ in used.family.denoiser.named_parameters() if "lora_B" in n)
    )
    assert weight.dtype == torch.float32
