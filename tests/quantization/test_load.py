"""Loading weight by weight: the same weights as diffusers', in their quantization; errors of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode

from lit_lora.adapters.in_place import adapt_in_place
from lit_lora.distributed.node import Node
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion, StableDiffusionXL
from lit_lora.quantization import FP8, NF4, Dense, Int8, Quantization
from lit_lora.quantization.frozen_layer import FrozenLayer
from lit_lora.quantization.load import load_model, load_part, shape_model, shape_part
from tests.helpers import Classifier

NAME = "diffusion_pytorch_model"


def _load(folder: Path, quantization: Quantization | None = None, variant: str | None = None) -> torch.nn.Module:
    return load_model(
        UNet2DConditionModel, str(folder), "unet", quantization or Dense(), torch.float32, variant=variant
    )


@pytest.fixture
def folder(sd_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(sd_folder / "unet", tmp_path / "unet")
    return tmp_path


@pytest.mark.parametrize("elements", [2**22, 300], ids=["together", "in bundles"])
@pytest.mark.parametrize("name", ["sd_folder", "sdxl_folder"])
def test_the_weights_are_those_of_from_pretrained(
    name: str, elements: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_lora.quantization.load._BUNDLE_ELEMENTS", elements)
    source = request.getfixturevalue(name)
    theirs = UNet2DConditionModel.from_pretrained(source, subfolder="unet").state_dict()
    mine = _load(source).state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


class WithTables(ModelMixin, ConfigMixin):
    """A model that computes tensors when it is built, of which no file knows."""

    @register_to_config
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(size, size)
        self.layer.register_buffer("buffered", torch.arange(size) * 2.0, persistent=False)
        # As models of diffusers keep complex numbers, which a buffer would lose when it is cast.
        self.layer.plain = torch.arange(size) * 3j


def test_tensors_that_the_model_computes(tmp_path: Path) -> None:
    WithTables().save_pretrained(tmp_path / "part")
    model = load_model(WithTables, str(tmp_path), "part", Int8(), torch.bfloat16)
    assert torch.equal(model.layer.buffered, torch.tensor([0.0, 2, 4]))
    assert torch.equal(model.layer.plain, torch.tensor([0, 3j, 6j]))


@pytest.mark.parametrize("quantization", [Int8(), FP8(), NF4()], ids=lambda s: type(s).__name__)
def test_layers_are_in_their_storage_and_the_rest_is_not(quantization: Quantization, sd_folder: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.bfloat16, quantization=quantization)
    layers = {name: layer for name, layer in family.denoiser.named_modules() if isinstance(layer, FrozenLayer)}
    dense = {name for name, layer in layers.items() if isinstance(layer.quantization, Dense)}
    assert dense == {name for name in layers if name.startswith(("conv_in", "conv_out", "time_embedding."))} | {
        name for name in layers if name.endswith(".time_emb_proj")
    }
    assert any(layer.weight_shape[2:] == (3, 3) and name not in dense for name, layer in layers.items())
    original = load_file(sd_folder / "unet" / f"{NAME}.safetensors")
    for name, layer in layers.items():
        expected = original[f"{name}.weight"]
        if name in dense:
            assert torch.equal(layer.weight, expected.bfloat16())
        else:
            assert layer.weight.dtype == torch.bfloat16
            assert torch.equal(
                layer.weight, quantization.dequantize(quantization.quantize(expected), expected.shape, torch.bfloat16)
            )
    others = {name: p for name, p in family.denoiser.named_parameters() if ".norm" in name or name.endswith("bias")}
    assert others
    assert {p.dtype for p in others.values()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in family.denoiser.parameters())


def test_further_layers_can_be_skipped(sd_folder: Path) -> None:
    layer = _load(sd_folder, Int8(skip=["mid_block.*"])).get_submodule("mid_block.resnets.0.conv1")
    assert isinstance(layer, FrozenLayer)
    assert isinstance(layer.quantization, Dense)


def test_a_pattern_of_skipped_layers_that_matches_none(sd_folder: Path) -> None:
    told = r"skip: 'mid_blok\.\*' matches none of the \d+ layers that Int8 quantizes; correct or remove it\. The first .* conv_in"
    with pytest.raises(UserError, match=told):
        _load(sd_folder, Int8(skip=["mid_block.*", "mid_blok.*"]))
    with pytest.raises(UserError, match="skip: 'head' matches none of the 2 layers that Int8 quantizes"):
        adapt_in_place(Classifier(), LoraConfig(r=2, target_modules=["0"]), quantization=Int8(skip=["head"]))
    with pytest.raises(
        UserError, match=r"quantization=Int8 has no effect, since Classifier has no frozen Linear or Conv2d"
    ):
        adapt_in_place(Classifier(), LoraConfig(r=2, target_modules=["0"]), quantization=Int8(skip=["net.*"]))


@pytest.mark.parametrize("quantization", [Dense(), Int8(), FP8(), NF4()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_shapes_without_weights_are_those_of_a_real_load(
    quantization: Quantization, family: type[StableDiffusion], sd_folder: Path, sdxl_folder: Path
) -> None:
    source = str(sd_folder if family is StableDiffusion else sdxl_folder)
    real, shape = family(source), family(source)
    real.load(torch.bfloat16, quantization=quantization)
    with FakeTensorMode():
        shape.load(torch.bfloat16, quantization=quantization, weights=False)
    described = [
        [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
        for model in (real, shape)
    ]
    assert described[0] == described[1]


def test_buffers_of_the_files_have_the_dtype_of_the_weights(tmp_path: Path) -> None:
    AutoencoderKLFlux2(block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=4).save_pretrained(
        tmp_path / "vae"
    )
    arguments = (AutoencoderKLFlux2, str(tmp_path), "vae", torch.bfloat16)
    real, shape = load_part(*arguments, Node()), shape_part(*arguments)
    described = [[(name, tuple(b.shape), b.dtype) for name, b in model.named_buffers()] for model in (real, shape)]
    assert described[0] == described[1]
    assert ("bn.running_var", (16,), torch.bfloat16) in described[0]


def test_no_weight_is_read_for_the_shapes(folder: Path) -> None:
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    shape_model(UNet2DConditionModel, str(folder), "unet", Int8(), torch.bfloat16)


def test_files_in_parts(folder: Path) -> None:
    expected = _load(folder).state_dict()
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    model = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(folder), subfolder="unet"))
    model.load_state_dict(expected)
    model.save_pretrained(folder / "unet", max_shard_size="50KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert all(torch.equal(value, expected[key]) for key, value in _load(folder).state_dict().items())
    index = json.loads((folder / "unet" / f"{NAME}.safetensors.index.json").read_text())
    missing = sorted(set(index["weight_map"].values()))[-1]
    (folder / "unet" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"lists {missing}, which is missing"):
        _load(folder)


@pytest.mark.parametrize("parts", [False, True])
def test_variants(folder: Path, parts: bool) -> None:
    model = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    model.save_pretrained(folder / "unet", variant="fp16", max_shard_size="50KB" if parts else "1GB")
    assert _load(folder, variant="fp16").state_dict().keys() == model.state_dict().keys()
    with pytest.raises(FileNotFoundError, match=r"no weights there: none of diffusion_pytorch_model.safetensors,"):
        _load(folder)


def test_pickled_weights(folder: Path) -> None:
    file = folder / "unet" / f"{NAME}.safetensors"
    weights = load_file(file)
    file.unlink()
    torch.save(weights, folder / "unet" / f"{NAME}.bin")
    assert all(torch.equal(value, weights[key]) for key, value in _load(folder).state_dict().items())


def test_pickled_weights_of_old_and_damaged_ones(folder: Path) -> None:
    file = folder / "unet" / f"{NAME}.safetensors"
    weights = load_file(file)
    file.unlink()
    pickled = folder / "unet" / f"{NAME}.bin"
    torch.save(weights, pickled, _use_new_zipfile_serialization=False)
    assert all(torch.equal(value, weights[key]) for key, value in _load(folder).state_dict().items())
    pickled.write_bytes(b"not a pickle")
    with pytest.raises(OSError, match="is damaged"):
        _load(folder)


def test_wrong_files(folder: Path) -> None:
    file = folder / "unet" / f"{NAME}.safetensors"
    weights = load_file(file)
    first = min(weights)
    save_file({key: value for key, value in weights.items() if key != first}, file)
    with pytest.raises(UserError, match=f"1 weights are not in the file, the first: {first}"):
        _load(folder)
    save_file(weights | {"strange": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="1 weights of the file are not in the model, the first: strange"):
        _load(folder)
    save_file(weights | {first: torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match=rf"{first} is .* in the file .* in the model"):
        _load(folder)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match="is damaged"):
        _load(folder)


def test_the_whole_family_says_which_part_is_wrong(folder: Path, sd_folder: Path) -> None:
    for part in ("vae", "scheduler", "tokenizer", "text_encoder"):
        shutil.copytree(sd_folder / part, folder / part)
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load 'unet' of .*no weights there"):
        StableDiffusion(str(folder)).load(torch.float32)
