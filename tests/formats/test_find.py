"""An adapter is found in whatever it is written, and what is none is one error."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from benchmarks.process_memory import resident
from lit_lora.adapter_tools.product_layer import product_layers
from lit_lora.adapters import plain_config
from lit_lora.errors import UserError
from lit_lora.families import Flux, ModelFamily, StableDiffusion, StableDiffusion3, StableDiffusionXL
from lit_lora.files import sync
from lit_lora.formats import AdapterFiles, write_adapter
from lit_lora.formats.find import read_adapter
from lit_lora.formats.lora import layers_of
from tests.formats.adapters import loaded, trained
from tests.formats.test_formats import adapter_for, same


@pytest.fixture(scope="module")
def folder(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter in the default formats."""
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(adapter_for(sd_folder, LoraConfig(r=2, lora_alpha=4, rank_pattern={"to_q": 3})), folder)
    return folder


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_folder_or_any_of_its_files(name: str, folder: Path) -> None:
    read = read_adapter(folder / name)
    same(read, read_adapter(folder))
    assert read.family is StableDiffusion


def test_content_counts_and_no_name(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "pytorch_lora_weights.safetensors", tmp_path / "adapter_model.safetensors")
    same(read_adapter(tmp_path), read_adapter(folder))


def test_the_family_of_a_base_on_this_machine(folder: Path, sd_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    text = (folder / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text)
    assert read_adapter(tmp_path).family is StableDiffusion  # its layers tell it
    assert read_adapter(tmp_path).denoiser_config == {}
    (tmp_path / "adapter_config.json").write_text(text.replace('"a base"', f'"{sd_folder}"'))
    read = read_adapter(tmp_path)
    assert (read.family, read.denoiser_config["layers_per_block"]) == (StableDiffusion, 1)


def test_files_of_diffusers_without_a_config(folder: Path, tmp_path: Path) -> None:
    """As older versions write them, under each of their names; ranks come from the tensors, and no update is scaled."""
    expected = read_adapter(folder)
    for new, old in (("lora_A", "lora.down"), ("lora_A", "lora_A")):
        other = new.replace("A", "B"), old.replace("down", "up").replace("A", "B")
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        save_file(
            {key.replace(new, old).replace(*other): value for key, value in tensors.items()}, tmp_path / "x.safetensors"
        )
        read = read_adapter(tmp_path / "x.safetensors", StableDiffusion)
        assert read.state.keys() == expected.state.keys()
        assert (read.config["r"], read.config["lora_alpha"]) == (2, 2)
        assert set(read.config["rank_pattern"].values()) == set(read.config["alpha_pattern"].values()) == {3}


def test_diffusers_own_file(sd_folder: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    read = read_adapter(tmp_path)
    assert read.state.keys() == {f"base_model.model.{key}" for key in state}
    assert len(read.config["target_modules"]) == len(state) // 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere pages are not released")
def test_a_file_that_has_been_read_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    state = {f"base_model.model.x.lora_{end}": torch.randn(3000, 3000) for end in ("A.weight", "B.weight")}
    write_adapter(AdapterFiles(state, plain_config(LoraConfig(r=3000, target_modules=["x"]))), tmp_path / "big")
    sync(tmp_path / "big" / "adapter_model.safetensors")  # pages stay while they are being written to the disk
    before = resident()
    read = read_adapter(tmp_path / "big")
    assert resident() - before < 20_000_000
    assert all(torch.equal(value, state[name]) for name, value in read.state.items())


@pytest.mark.parametrize(
    "kind",
    ["missing", "truncated", "nan", "int8", "complex64", "half", "nothing", "foreign", "several", "pickle", "folder"],
)
def test_what_is_no_adapter_is_one_error(kind: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    first = min(tensors)
    expected = "does not exist; name a" if kind == "missing" else "cannot read"
    if kind == "nan":
        tensors[first][0] = torch.nan
        expected = "1 tensors of the adapter .* hold NaN or Inf"
    elif kind in ("int8", "complex64"):
        tensors[first] = tensors[first].to(getattr(torch, kind))
        expected = f"holds .*lora_A.weight as {kind}, and adapters are read from floats alone"
    elif kind == "half":
        del tensors[first]
        expected = "is incomplete: it has no lora_A of "
    elif kind == "nothing":
        tensors, expected = {}, "is not an adapter that this version reads .*: it holds no tensors"
    elif kind == "foreign":
        tensors, expected = {"model.layers.0.weight": torch.ones(1)}, "it holds model.layers.0.weight"
    if kind != "missing":
        save_file(tensors, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif kind == "several":
        shutil.copy(path, tmp_path / "b.safetensors")
        path, expected = tmp_path, "it holds adapter.safetensors, b.safetensors; name a file"
    elif kind == "pickle":
        path, expected = tmp_path / "a.ckpt", "may run code when it is read"
    elif kind == "folder":
        path.unlink()
        path, expected = tmp_path, "it holds none"
    with pytest.raises(UserError, match=expected):
        read_adapter(path)


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read all
    with pytest.raises(UserError, match=r"cannot read .*safetensors: Permission denied; change the permissions there$"):
        read_adapter(folder)


def test_another_family(folder: Path) -> None:
    with pytest.raises(UserError, match=r"holds an adapter of a unet, not of a transformer \(Flux\)"):
        read_adapter(folder / "pytorch_lora_weights.safetensors", Flux)


KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "family", "expected"),
    [
        ({"lora_up.weight": None}, None, f"is incomplete: it has no lora_up of {KOHYA}"),
        (
            {"lora_up.weight": torch.ones(4, 3)},
            None,
            "lora_down and lora_up of .* have the shapes .*which share no rank",
        ),
        ({"lora_mid.weight": torch.ones(2, 2, 3, 3)}, None, "is a LoRA in three factors"),
        (
            {"dora_scale": torch.ones(1, 6)},
            None,
            r"dora_scale of .* has the shape \(1, 6\), while PEFT's DoRA has one magnitude for each of the 4 outputs",
        ),
        ({"dora_scale": torch.tensor(1.0)}, None, r"has the shape \(\), while"),
        ({"dora_scale": torch.ones(4, 2)}, None, r"has the shape \(4, 2\), while"),
        ({"hada_w1_a": torch.ones(4, 2)}, None, "has hada_w1_a, and other layers have LoRA|lora_down"),
        ({}, Flux, "is not an adapter of Flux, which has no layer lora_unet_down_blocks"),
    ],
)
def test_bad_files_of_kohya(
    change: dict[str, torch.Tensor | None], family: type[ModelFamily] | None, expected: str, tmp_path: Path
) -> None:
    group = {
        "lora_down.weight": torch.ones(2, 6),
        "lora_up.weight": torch.ones(4, 2),
        "alpha": torch.tensor(1.0),
    } | change
    tensors = {f"{KOHYA}.{end}": value for end, value in group.items() if value is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=expected):
        read_adapter(tmp_path / "a.safetensors", family)


@pytest.mark.parametrize(
    ("method", "tensor", "shape"),
    [
        ("hada", "hada_w1_b", ()),
        ("hada", "hada_w2_a", (0, 2)),
        ("hada", "alpha", (2,)),
        ("lokr", "lokr_w1", ()),
        ("lokr", "lokr_w2_a", (4,)),
        ("lokr", "lokr_w2_b", (0, 3)),
    ],
)
def test_damaged_shapes_of_lycoris(method: str, tensor: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 3)}
    if method == "hada":
        shapes = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}
    shapes |= {"alpha": (), tensor: shape}
    save_file({f"{KOHYA}.{name}": torch.ones(one) for name, one in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"is damaged: {tensor} of .* has the shape {re.escape(str(shape))}"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "shapes",
    [
        {"hada_w1_b": (3, 6)},
        {"hada_w2_a": (4, 1)},
        {"hada_t1": (2, 3, 1, 1), "hada_t2": (2, 2, 1, 1), "hada_w1_a": (2, 4), "hada_w2_a": (2, 4)},
    ],
)
def test_factors_of_loha_share_their_rank(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    shapes = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6), "alpha": ()} | shapes
    save_file({f"{KOHYA}.{name}": torch.ones(one) for name, one in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"is damaged: hada_w[12]_a and hada_w[12]_b of .*, which share no rank"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("method", "tensor", "value", "error"),
    [
        (
            "lora",
            "lora_magnitude_vector",
            torch.ones(3),
            r"lora_magnitude_vector of mid.to_q has the shape \(3,\), .* 4 outputs",
        ),
        ("lora", "lora_magnitude_vector", torch.tensor(1.0), r"has the shape \(\)"),
        (
            "loha",
            "hada_w1_a",
            torch.ones(4, 1),
            "hada_w1_a and hada_w1_b of mid.to_q have the shapes .*, which share no rank",
        ),
    ],
)
def test_damaged_shapes_of_peft(method: str, tensor: str, value: torch.Tensor, error: str) -> None:
    shapes = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}
    if method == "lora":
        shapes = {"lora_A.weight": (2, 6), "lora_B.weight": (4, 2)}
    state = {name: torch.ones(one) for name, one in shapes.items()} | {tensor: value}
    state = {f"base_model.model.mid.to_q.{name}": one for name, one in state.items()}
    with pytest.raises(UserError, match=error):
        if method == "lora":
            layers_of(state, "a")
        else:
            list(product_layers(AdapterFiles(state, {"peft_type": "LOHA", "r": 2, "alpha": 2})))


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        ("oft_blocks", "OFT or BOFT of LyCORIS and sd-scripts"),
        ("a1.weight", "GLoRA of LyCORIS"),
        ("on_input", "IA3 of LyCORIS"),
        ("diff", "changes of whole weights"),
        ("b_norm", "changes of whole weights, norms or biases"),
        ("scalar", "layers with a trained scalar of LyCORIS"),
    ],
)
def test_methods_that_peft_computes_otherwise(tensor: str, what: str, tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = tmp_path / "other.safetensors"
    save_file({f"{layer}.{tensor}": torch.ones(2, 2), f"{layer}.alpha": torch.ones(())}, path)
    with pytest.raises(UserError, match=f"other.safetensors holds {what}.*; merge it with its base"):
        read_adapter(path)


def test_the_newest_adapter_of_a_runs_folder_is_named(tmp_path: Path) -> None:
    for version, step in ((9, 9), (10, 9), (10, 10)):
        (tmp_path / f"lightning_logs/version_{version}/checkpoints/step={step}.adapter").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has one; name it: .*version_10/checkpoints/step=10\.adapter"):
        read_adapter(tmp_path)


def test_embeddings_inside_a_lora(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    path = tmp_path / "bundle.safetensors"
    save_file({**tensors, "bundle_emb.cat.string_to_param.*": torch.ones(1, 16)}, path)
    with pytest.raises(UserError, match="holds embeddings of new tokens inside a file of LoRA"):
        read_adapter(path)


def test_layers_of_no_family(tmp_path: Path) -> None:
    name = "lora_unet_nowhere"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 6)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"of a known family \(.*Flux.*\): none has all its layers, such as {name}"):
        read_adapter(tmp_path / "a.safetensors")


def test_metadata_tell_between_families(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 6), f"{name}.lora_up.weight": torch.ones(4, 2)}
    told: list[tuple[dict[str, str], type[ModelFamily]]] = [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, StableDiffusionXL),
        ({"ss_base_model_version": "sd_v1"}, StableDiffusion),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, StableDiffusion),
        # Another model of the same code.
        (
            {
                "modelspec.architecture": "stable-diffusion-xl-v9/lora",
                "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            },
            StableDiffusionXL,
        ),
    ]
    for metadata, family in told:
        save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
        assert read_adapter(tmp_path / "a.safetensors").family is family


def test_another_familys_peft_folder(tmp_path: Path, sdxl_folder: Path) -> None:
    adapter = trained(loaded(StableDiffusionXL, sdxl_folder), LoraConfig(r=2, target_modules=["to_q"]))
    write_adapter(replace(adapter, family=None, denoiser_config={}), tmp_path)
    with pytest.raises(UserError, match="is an adapter of StableDiffusionXL, not of StableDiffusion3"):
        read_adapter(tmp_path, StableDiffusion3)
