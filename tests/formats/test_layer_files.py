"""Files of kohya's scripts, ComfyUI and LyCORIS for each family: exact round trips, and the same outputs in diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import swap_scale_shift
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_lora.adapters import load_adapter, plain_config
from lit_lora.errors import UserError
from lit_lora.families import Flux, Flux2, ModelFamily, StableDiffusion, StableDiffusionXL
from lit_lora.formats import FORMATS, AdapterFiles, TensorFile, format_named
from lit_lora.formats.find import read_adapter
from tests.formats.adapters import ALL_LAYERS, FAMILIES, encoder_adapter, loaded, trained
from tests.formats.test_formats import same

LAYER_FILES = ("kohya", "comfyui", "lycoris")

CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "attention": lambda: LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["to_q", "to_k", "to_out.0"],
        rank_pattern={"to_q": 3},
        alpha_pattern={"to_q": 4.5},
    ),
    "all layers": lambda: LoraConfig(r=3, lora_alpha=2, target_modules=ALL_LAYERS),
    "rank stabilized": lambda: LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=["to_v"]),
    "DoRA": lambda: LoraConfig(
        r=2, lora_alpha=3, use_dora=True, target_modules=r".*(to_[qkv]|proj_mlp|conv1|ff.net.2)"
    ),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> ModelFamily:
    return loaded(FAMILIES[request.param], request.getfixturevalue(request.param))


def write(adapter: AdapterFiles, name: str, folder: Path) -> Path:
    """The adapter's file."""
    one = format_named(name)
    assert one.why_not(adapter) == ""
    one.write(adapter, folder)
    return folder / one.file_name


def without_configs(file: Path, **metadata: str) -> Path:
    """The file without this project's PEFT configs, as another tool would write it for the same model."""
    opened = TensorFile.open(file)
    entry = json.loads(opened.metadata["lit_lora"])
    del entry["configs"]
    save_file(dict(opened.tensors), file, metadata={"lit_lora": json.dumps(entry), **metadata})
    return file


def outputs(model: ModelFamily, adapter: AdapterFiles | None = None) -> dict[str, Tensor]:
    """Weights of the denoiser with an adapter merged into them."""
    denoiser = model.denoiser
    if adapter is not None:
        denoiser = load_adapter(denoiser, adapter.config, adapter.state, "adapter").merge_and_unload()
    return {name: value.clone() for name, value in denoiser.state_dict().items()}


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).abs().max() < 1e-5, name


def merged(model: ModelFamily, adapter: AdapterFiles) -> dict[str, Tensor]:
    """Weights of a fresh copy of the model with the adapter merged into them."""
    return outputs(loaded(type(model), Path(model.pretrained_model_name_or_path)), adapter)


def in_diffusers(model: ModelFamily, file: Path) -> dict[str, Tensor]:
    """Weights of the denoiser after diffusers has loaded and merged the file."""
    fresh = loaded(type(model), Path(model.pretrained_model_name_or_path))
    with fresh.all_parts():
        pipeline: Any = fresh.pipeline()
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        pipeline.fuse_lora(components=[fresh.denoiser_name])
        pipeline.unload_lora_weights()
    return {name: value.clone() for name, value in fresh.denoiser.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("one", ["diffusers", *LAYER_FILES])
def test_a_file_gives_back_its_adapter(one: str, name: str, model: ModelFamily, tmp_path: Path) -> None:
    encoders = {part: encoder_adapter() for part in list(type(model).kohya_encoders)[:1]}
    adapter = replace(trained(model, CONFIGS[name]()), text_encoders=encoders)
    file = write(adapter, one, tmp_path)
    assert [other.name for other in FORMATS if other.recognizes(TensorFile.open(file))] == [one]
    read = read_adapter(file)
    same(read, adapter)
    assert (read.family, dict(read.denoiser_config)) == (type(model), json.loads(json.dumps(model.naming_config)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("one", LAYER_FILES)
def test_a_file_without_configs_means_the_same(one: str, name: str, model: ModelFamily, tmp_path: Path) -> None:
    """And a second round trip is exact: nothing is divided further."""
    adapter = trained(model, CONFIGS[name]())
    file = without_configs(write(adapter, one, tmp_path))
    read = read_adapter(file)
    (tmp_path / "again").mkdir()
    again = write(read, one, tmp_path / "again")
    before, after = load_file(file), load_file(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items() if not key.endswith(".alpha"))
    assert all(torch.allclose(value, after[key]) for key, value in before.items())
    close(merged(model, read), merged(model, adapter))


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_loads_its_file(name: str, model: ModelFamily, tmp_path: Path) -> None:
    adapter = trained(model, CONFIGS[name]())
    close(in_diffusers(model, write(adapter, "diffusers", tmp_path)), merged(model, adapter))


@pytest.mark.parametrize("name", ["all layers", "rank stabilized"])
@pytest.mark.parametrize("fixture", ["sd_folder", "sdxl_folder"])
def test_diffusers_loads_kohyas_file(fixture: str, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As far as diffusers reads these files: it leaves out DoRA and alphas that differ between layers."""
    model = loaded(FAMILIES[fixture], request.getfixturevalue(fixture))
    adapter = trained(model, CONFIGS[name]())
    close(in_diffusers(model, write(adapter, "kohya", tmp_path)), merged(model, adapter))


def test_diffusers_converts_kohyas_flux_file(tmp_path: Path) -> None:
    """Its converter has FLUX.1's width built in, so the layers are those of one real block."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"to_q": (3072, 2), "to_k": (3072, 2), "to_v": (3072, 2), "proj_mlp": (12288, 2)}
    state: dict[str, Tensor] = {}
    for part, (outputs, rank) in sizes.items():
        layer = f"single_transformer_blocks.7.{'' if part == 'proj_mlp' else 'attn.'}{part}"
        state[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, 3072, generator=generator)
        state[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    config = plain_config(LoraConfig(r=2, lora_alpha=4, target_modules=list(sizes)))
    file = write(AdapterFiles(state, config, family=Flux), "kohya", tmp_path)
    theirs = Flux.pipeline_class.lora_state_dict(load_file(file))
    for layer in {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in state}:
        down, up = (theirs[f"transformer.{layer}.lora_{letter}.weight"] for letter in "AB")
        ours = state[f"base_model.model.{layer}.lora_B.weight"] @ state[f"base_model.model.{layer}.lora_A.weight"]
        assert torch.allclose(up @ down, 4 / 2 * ours, atol=1e-3)


def test_flux2_in_other_tools(flux2_folder: Path, tmp_path: Path) -> None:
    """Diffusers reads kohya's file, in which query, key and value of single blocks are one layer as in diffusers itself."""
    model = loaded(Flux2, flux2_folder)
    adapter = trained(model, LoraConfig(r=2, lora_alpha=4))
    kohya = write(adapter, "kohya", tmp_path)
    assert "lora_unet_single_blocks_1_linear1.lora_up.weight" in load_file(kohya)
    close(in_diffusers(model, kohya), merged(model, adapter))
    for name in ("kohya", "comfyui"):
        read = read_adapter(write(adapter, name, tmp_path))
        assert read.family is Flux2
        close(merged(model, read), merged(model, adapter))


def test_parts_that_share_a_factor_keep_sharing_it(flux_folder: Path, tmp_path: Path) -> None:
    """As kohya's scripts train query, key and value of FLUX.1: as one layer."""
    generator = torch.Generator().manual_seed(4)
    name = "lora_unet_double_blocks_1_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 32, generator=generator),
        f"{name}.lora_up.weight": torch.randn(96, 4, generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "qkv.safetensors", metadata={"ss_base_model_version": "flux1"})
    read = read_adapter(tmp_path / "qkv.safetensors")
    assert (read.family, read.config["r"], read.config["lora_alpha"]) == (Flux, 4, 2)
    delta = 2 / 4 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    before, after = outputs(loaded(Flux, flux_folder)), outputs(loaded(Flux, flux_folder), read)
    for part, rows in zip(("to_q", "to_k", "to_v"), delta.split(32), strict=True):
        key = f"transformer_blocks.1.attn.{part}.weight"
        assert torch.allclose(after[key] - before[key], rows, atol=1e-5)
    again = load_file(write(read, "kohya", tmp_path))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(value, again[key]) for key, value in tensors.items())


def test_parts_with_other_scales_and_without_lora(flux_folder: Path, tmp_path: Path) -> None:
    model = loaded(Flux, flux_folder)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], rank_pattern={"to_v": 5})
    adapter = trained(model, config)
    file = write(adapter, "comfyui", tmp_path)
    assert load_file(file)["diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"].shape == (96, 7)
    close(merged(model, read_adapter(file)), merged(model, adapter))


def test_dora_of_some_parts_of_a_layer(flux_folder: Path, tmp_path: Path) -> None:
    adapter = trained(loaded(Flux, flux_folder), LoraConfig(r=2, use_dora=True, target_modules=["to_q"]))
    with pytest.raises(
        UserError, match=r"is one layer in this format, and DoRA changes only .*to_q of .*adapt all of them"
    ):
        format_named("kohya").write(adapter, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 3}),
        LoHaConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], use_effective_conv2d=True),
        LoKrConfig(r=1, alpha=3, target_modules=["to_q", "conv1"], decompose_both=True),
        LoKrConfig(r=64, alpha=64, target_modules=["to_q", "conv1"], decompose_factor=2),
    ],
    ids=["LoHa", "LoHa of convolutions", "LoKr", "LoKr of full matrices"],
)
def test_lycoris_holds_loha_and_lokr(config: PeftConfig, sdxl_folder: Path, tmp_path: Path) -> None:
    model = loaded(StableDiffusionXL, sdxl_folder)
    adapter = trained(model, config)
    file = write(adapter, "lycoris", tmp_path)
    same(read_adapter(file), adapter)
    read = read_adapter(without_configs(file))
    close(merged(model, read), merged(model, adapter))
    before, after = load_file(file), load_file(write(read, "lycoris", tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items() if not key.endswith(".alpha"))


def test_what_lycoris_does_not_hold(sd_folder: Path) -> None:
    why_not = format_named("lycoris").why_not
    lokr = trained(loaded(StableDiffusion, sd_folder), LoKrConfig(r=64, alpha=32, target_modules=["to_q"]))
    assert "PEFT scales it by alpha / r = 0.5; set alpha to r" in why_not(lokr)
    oft = trained(loaded(StableDiffusion, sd_folder), OFTConfig(r=2, oft_block_size=0, target_modules=["to_q"]))
    assert why_not(oft) == "it holds LoRA, and this is OFT"


@pytest.mark.parametrize("name", ["loha", "lokr", "lokr_full", "locon_dora"])
def test_files_that_lycoris_wrote(name: str, sd_folder: Path, tmp_path: Path) -> None:
    file = Path(__file__).parent / "data" / f"lycoris_{name}.safetensors"
    with pytest.raises(UserError, match="may be an adapter of StableDiffusion or StableDiffusionXL; set the family"):
        read_adapter(file)
    read = read_adapter(file, StableDiffusion)
    tensors = load_file(file)
    before = outputs(loaded(StableDiffusion, sd_folder))
    after = outputs(loaded(StableDiffusion, sd_folder), read)
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert len(changed) == 3
    for key in changed:
        name = "lycoris_" + key.removesuffix(".weight").replace(".", "_")
        group = {at.removeprefix(f"{name}."): value for at, value in tensors.items() if at.startswith(f"{name}.")}
        assert torch.allclose(after[key], by_formula(group, before[key]), atol=1e-5), key
    again = load_file(write(replace(read, denoiser_config={}), "lycoris", tmp_path))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(value, again[key]) for key, value in tensors.items() if not key.endswith(".alpha"))


def by_formula(group: dict[str, Tensor], weight: Tensor) -> Tensor:
    """A layer's weight with LyCORIS' tensors, after its papers: Hyeon-Woo et al. (2021), Yeh et al. (2023), Liu et al. (2024)."""

    def matrix(name: str) -> Tensor:
        if name in group:
            return group[name]
        first, second = group[f"{name}_a"], group[f"{name}_b"]
        core = group.get(name.replace("w", "t"))
        return first @ second if core is None else torch.einsum("ijkl,ip,jr->prkl", core, first, second)

    if "hada_w1_a" in group:
        return weight + (matrix("hada_w1") * matrix("hada_w2")).reshape(weight.shape) * (group["alpha"] / 2)
    if "lokr_w1" in group:
        first, second = matrix("lokr_w1"), matrix("lokr_w2").contiguous()
        return weight + torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second).reshape(weight.shape)
    up, down = group["lora_up.weight"], group["lora_down.weight"]
    full = weight + group["alpha"] / 2 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    norm = full.flatten(1).norm(dim=1).reshape(-1, *[1] * (full.ndim - 1))
    return group["dora_scale"] * full / norm


@pytest.mark.parametrize("fixture", ["sd3_folder", "flux_folder"])
def test_scale_and_shift_change_places(fixture: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As diffusers exchanges them in its own conversion of the published weights."""
    model = loaded(FAMILIES[fixture], request.getfixturevalue(fixture))
    adapter = trained(model, LoraConfig(r=2, target_modules=ALL_LAYERS))
    written = load_file(write(adapter, "comfyui", tmp_path))
    layers = {"norm_out.linear": ("final_layer.adaLN_modulation.1", True)}
    if fixture == "sd3_folder":  # whose last block has two modulations of the text, and the others six
        layers["transformer_blocks.1.norm1_context.linear"] = ("joint_blocks.1.context_block.adaLN_modulation.1", True)
        layers["transformer_blocks.0.norm1_context.linear"] = ("joint_blocks.0.context_block.adaLN_modulation.1", False)
    for layer, (native, exchanged) in layers.items():
        up = adapter.state[f"base_model.model.{layer}.lora_B.weight"]
        expected = swap_scale_shift(up) if exchanged else up
        assert torch.equal(written[f"diffusion_model.{native}.lora_up.weight"], expected)


@pytest.mark.parametrize(
    ("fixture", "native", "pattern"),
    [
        ("sd3_folder", "joint_blocks.1.context_block.attn.qkv", "transformer_blocks.1.attn.add_{}_proj"),
        ("flux_folder", "double_blocks.0.txt_attn.qkv", "transformer_blocks.0.attn.add_{}_proj"),
    ],
)
def test_query_key_and_value_are_in_this_order(
    fixture: str, native: str, pattern: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = loaded(FAMILIES[fixture], request.getfixturevalue(fixture))
    names = [f"add_{letter}_proj" for letter in "qkv"]
    adapter = trained(model, LoraConfig(r=2, lora_alpha=3, target_modules=names))
    written = load_file(write(adapter, "kohya", tmp_path))
    name = f"lora_unet_{native.replace('.', '_')}"
    up, down, alpha = (written[f"{name}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
    rows = (alpha / len(down) * up @ down).chunk(3)
    for letter, found in zip("qkv", rows, strict=True):
        layer = f"base_model.model.{pattern.format(letter)}"
        expected = 3 / 2 * adapter.state[f"{layer}.lora_B.weight"] @ adapter.state[f"{layer}.lora_A.weight"]
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_name_that_ends_another_has_a_rank_of_its_own(flux_folder: Path, tmp_path: Path) -> None:
    """FLUX.1 has a ``proj_out`` at its end and one in each block."""
    model = loaded(Flux, flux_folder)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=r"(.*\.)?proj_out", rank_pattern={"^proj_out": 3})
    adapter = trained(model, config)
    read = read_adapter(without_configs(write(adapter, "kohya", tmp_path)))
    assert read.config["rank_pattern"] == {"^proj_out": 3}
    close(merged(model, read), merged(model, adapter))
    only_last = trained(loaded(Flux, flux_folder), LoraConfig(r=2, target_modules=r"proj_out"))
    close(merged(model, read_adapter(without_configs(write(only_last, "kohya", tmp_path)))), merged(model, only_last))
