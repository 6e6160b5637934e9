"""Models in one file: the same weights as in the folder, read one by one; what is no base is refused."""

from __future__ import annotations

import functools
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from lit_lora.errors import UserError
from lit_lora.families import (
    Flux,
    Flux2,
    ModelFamily,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    check_single_file,
    prepare,
)
from lit_lora.families.deferred import Deferred
from lit_lora.families.hub import check_hub
from lit_lora.families.single_file import SingleFile, open_single_file
from lit_lora.module import LoraDiffusion
from lit_lora.objectives import DDPM
from lit_lora.planning.plan_run import plan_run
from lit_lora.quantization import Int8
from tests.families.single_files import write_single_file
from tests.tiny_pipelines import tiny_clip_config
from tests.tools.test_base_options import adapter_of, drawn_with


class Case:
    """A pipeline's folder, the same model as one file, and a folder with what the file does not have."""

    def __init__(self, kind: type[ModelFamily], folder: Path, place: Path, whole: bool) -> None:
        self.kind, self.folder = kind, folder
        self.file = write_single_file(place / f"{kind.__name__}.safetensors", kind, folder, whole)
        self.config = place / f"{kind.__name__}_config"
        inside = ("vae", "unet", "text_encoder", "text_encoder_2") if whole else ("transformer",)
        unread = [f"{part}/*.safetensors" for part in inside]
        shutil.copytree(folder, self.config)
        for file in [file for pattern in unread for file in self.config.glob(pattern)]:
            file.unlink()

    def family(self, **options: Any) -> ModelFamily:
        return self.kind(str(self.file), config=str(self.config), **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[type[ModelFamily], Path], Case]:
    @functools.cache
    def make(kind: type[ModelFamily], folder: Path) -> Case:
        place = tmp_path_factory.mktemp(kind.__name__)
        if kind is StableDiffusionXL:  # by whose tenth layer in the second encoder diffusers knows it
            folder = Path(shutil.copytree(folder, place / "folder"))
            config = tiny_clip_config(tokenizer, 24)
            config.num_hidden_layers = 10
            CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
        return Case(kind, folder, place, whole=kind in (StableDiffusion, StableDiffusionXL))

    return make


@pytest.fixture
def _small_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers' function takes the width of the published model for all."""
    convert = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]["checkpoint_mapping_fn"]
    constants = tuple(32 if constant == 3072 else constant for constant in convert.__code__.co_consts)
    small = types.FunctionType(convert.__code__.replace(co_consts=constants), convert.__globals__)
    monkeypatch.setitem(SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"], "checkpoint_mapping_fn", small)


FAMILIES = {
    StableDiffusion: "sd_folder",
    StableDiffusionXL: "sdxl_folder",
    StableDiffusion3: "sd3_folder",
    Flux: "flux_folder",
    Flux2: "flux2_folder",
}


@pytest.mark.usefixtures("_small_flux")
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_weights_as_in_the_folder(
    kind: type[ModelFamily], case: Callable[..., Case], request: pytest.FixtureRequest
) -> None:
    made = case(kind, request.getfixturevalue(FAMILIES[kind]))
    family, expected = made.family(), kind(str(made.folder))
    for one in (family, expected):
        one.load(torch.float32, quantization=Int8())
    found = family.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert [name for name, value in expected.state_dict().items() if not torch.equal(value, found[name])] == []
    assert not any(parameter.requires_grad for parameter in family.parameters())
    with torch.no_grad():
        torch.testing.assert_close(family.encode_captions(["a star"]), expected.encode_captions(["a star"]))


@pytest.fixture
def sd(case: Callable[..., Case], sd_folder: Path) -> Case:
    return case(StableDiffusion, sd_folder)


def test_a_file_that_another_has_replaced_is_read_anew(sd: Case, tmp_path: Path) -> None:
    """As in a notebook that merges other adapters into the same file."""
    file, name = tmp_path / "model.safetensors", "model.diffusion_model.input_blocks.0.0.weight"
    tensors = load_file(sd.file)
    for factor in (1, 2):
        save_file({key: value * factor if key == name else value for key, value in tensors.items()}, tmp_path / "new")
        (tmp_path / "new").rename(file)
        family = StableDiffusion(str(file), config=str(sd.config))
        family.load(torch.float32, without={"text", "vae"})
        assert torch.equal(family.denoiser.conv_in.weight, tensors[name] * factor)
    assert open_single_file(file) is open_single_file(file)


def test_weights_are_read_one_by_one(sd: Case) -> None:
    """Opening reads names and shapes alone."""
    read: list[str] = []
    file = SingleFile(sd.file)
    for name, tensor in file._tensors.items():
        tensor._make = lambda name=name, make=tensor._make: (read.append(name), make())[1]  # type: ignore[misc]
    family = sd.family()
    family.load(torch.float32, without={"text", "vae"})
    weight = file.open(family.denoiser, list(family.denoiser.state_dict()))
    assert not read
    assert torch.equal(weight("conv_in.weight"), family.denoiser.conv_in.weight)
    assert read == ["model.diffusion_model.input_blocks.0.0.weight"]


def test_deferred_tensors() -> None:
    matrix, read = torch.arange(24.0).view(6, 4), []

    def make() -> Tensor:
        read.append(1)
        return matrix

    deferred = Deferred(matrix.to("meta"), make)
    first, _, last = deferred.chunk(3)
    several = [torch.cat([last, first]), deferred[:, 1], deferred.T.contiguous(), deferred.view(4, 6).clone() + 1]
    assert not read
    expected = [torch.cat([matrix[4:], matrix[:2]]), matrix[:, 1], matrix.T, matrix.view(4, 6) + 1]
    assert all(one.shape == other.shape for one, other in zip(several, expected, strict=True))
    assert all(torch.equal(one.value(), other) for one, other in zip(several, expected, strict=True))


def test_it_is_planned_as_the_folder(sd: Case) -> None:
    def peak(family: ModelFamily) -> int:
        return plan_run(LoraDiffusion(family, LoraConfig(r=2, target_modules=["to_q"])), 1, 16, 16).peak

    assert peak(sd.family()) == peak(StableDiffusion(str(sd.folder)))


def test_what_a_cache_depends_on(sd: Case, tmp_path: Path) -> None:
    before = sd.family().identity()
    weights = load_file(sd.file)
    changes = {
        "first_stage_model.quant_conv.bias": {"vae"},
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": {"text"},
        "model.diffusion_model.out.2.bias": set(),
    }
    for number, (name, parts) in enumerate(changes.items()):
        changed = tmp_path / f"{number}.safetensors"
        save_file({**weights, name: weights[name] + 1}, changed)
        after = StableDiffusion(str(changed), config=str(sd.config)).identity()
        assert {part for part in before if before[part] != after[part]} == parts
    config = sd.config / "vae" / "config.json"
    config.write_text(config.read_text() + " ")
    assert sd.family().identity()["vae"] != before["vae"]


def test_adapters_of_it_find_it_again(sd: Case, tmp_path: Path) -> None:
    adapter = adapter_of(sd.family(), tmp_path / "adapter")
    family = drawn_with(None, adapter)
    assert family.source == sd.family().source
    assert (drawn_with(sd.file, adapter, config=str(sd.config)).denoiser.conv_in.weight != 0).any()
    code = (adapter / "README.md").read_text().split("In diffusers:\n\n```python\n")[1].split("image =")[0]
    assert f'.from_single_file("{sd.file}", config="{sd.config}")' in code
    plain = StableDiffusionPipeline.from_single_file(str(sd.file), config=str(sd.config), safety_checker=None)
    assert torch.equal(plain.unet.conv_out.weight, family.denoiser.conv_out.weight)


def test_a_vae_file_beside_it(sd: Case, sdxl_folder: Path) -> None:
    vae = sdxl_folder / "vae" / "diffusion_pytorch_model.safetensors"
    family = sd.family(vae=str(vae))
    family.load(torch.float32, without={"text", "denoiser"})
    assert torch.equal(family.vae.quant_conv.weight, load_file(vae)["quant_conv.weight"])


class TestErrors:
    """One sentence with the file and what to do."""

    def error(self, path: Path, config: Path | None = None, kind: type[ModelFamily] = StableDiffusion) -> str:
        family = kind(str(path), config=None if config is None else str(config))
        with pytest.raises(UserError) as caught:
            prepare(family, DDPM())
            family.load(torch.float32)
        return str(caught.value)

    def saved(self, path: Path, *names: str) -> Path:
        save_file({name: torch.zeros(2, 2) for name in names}, path)
        return path

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ["lora_unet_a.lora_down.weight"],
                "is an adapter, not a base: it has lora_unet_a.lora_down.weight. Name the",
            ),
            (["unet.a.lora_A.weight"], "is an adapter, not a base"),
            (["a.weight", "a.weight.absmax"], "quantized weights with scales of their own (a.weight.absmax)"),
            (["a.weight", "a.scale_weight"], "take the file in bf16, fp16 or plain fp8"),
            (["a.weight"], "x.safetensors has no weights of it"),
            (["decoder.weight"], "does not hold this AutoencoderKL: "),
        ],
    )
    def test_what_is_no_base(self, names: list[str], message: str, sd: Case, tmp_path: Path) -> None:
        assert message in self.error(self.saved(tmp_path / "x.safetensors", *names), sd.config)

    def test_no_safetensors_file(self, sd: Case, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(b"<html>not found</html>")
        assert "is no model: it is no safetensors file, or damaged" in self.error(tmp_path / "x.safetensors")
        assert "there is no file" in self.error(tmp_path / "y.safetensors")

    @pytest.mark.parametrize("ending", ["ckpt", "pt"])
    def test_pickled_ones_are_not_opened(self, ending: str, tmp_path: Path) -> None:
        torch.save({}, tmp_path / f"x.{ending}")
        assert "is pickled, and reading it could run any program; take" in self.error(tmp_path / f"x.{ending}")

    def test_another_family(self, sd: Case) -> None:
        message = "StableDiffusionXL cannot train .* kind v1, not xl_base: use family StableDiffusion"
        with pytest.raises(UserError, match=message):
            check_single_file(StableDiffusionXL(str(sd.file)))
        assert "use family StableDiffusion" in self.error(sd.file, sd.config, Flux)

    @pytest.mark.parametrize(
        ("name", "shape", "kind"),
        [
            ("model.diffusion_model.input_blocks.0.0.weight", (4, 9, 1, 1), "inpainting"),
            ("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias", (1,), "xl_refiner"),
        ],
    )
    def test_kinds_of_no_family(self, name: str, shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
        save_file({name: torch.zeros(shape)}, tmp_path / "x.safetensors")
        found = self.error(tmp_path / "x.safetensors", tmp_path)
        assert f"a model of the kind {kind}, not v1 or v2: use the text-to-image model" in found

    def test_without_a_config(self, sd: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        check_hub.cache_clear()
        found = self.error(sd.file)
        assert "configs and tokenizers come from stable-diffusion-v1-5/stable-diffusion-v1-5: " in found
        assert found.endswith("; or set config to a folder of a pipeline of its kind")
        unknown = self.saved(tmp_path / "x.safetensors", "a.weight")
        assert "is of a kind that diffusers does not know" in self.error(unknown)

    def test_a_config_without_a_file(self, sd_folder: Path) -> None:
        assert "is for models in one file" in self.error(sd_folder, sd_folder)
