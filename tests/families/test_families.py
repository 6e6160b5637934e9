"""The contract of every family, and what is special to each."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, StableDiffusion, StableDiffusionXL
from lit_lora.quantization import NF4, Int8
from lit_lora.quantization.frozen_layer import quantized_layers
from tests.families.folders import BASES, FOLDERS, families_of_the_package
from tests.helpers import make_batches


def test_every_family_is_under_contract() -> None:
    assert set(FOLDERS) == families_of_the_package()


@pytest.fixture(params=BASES)
def family(request: pytest.FixtureRequest) -> ModelFamily:
    kind, fixture = BASES[request.param]
    family = kind(str(request.getfixturevalue(fixture)))
    family.load(torch.float32)
    return family


def test_a_step_gives_gradients_to_the_adapter_alone(family: ModelFamily) -> None:
    family.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian"))
    batch = make_batches(1)[0]
    latents, conditioning = family.encode(batch, Draws(0, batch["slot"]))
    assert latents.shape == (2, *family.latent_shape(16, 16))
    assert latents.dtype == torch.float32
    prediction = family.denoise(latents, torch.tensor([1, 999]), conditioning)
    assert prediction.shape == latents.shape
    prediction.square().mean().backward()
    with_gradient = {name for name, p in family.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in family.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in with_gradient)


def test_a_cached_batch_encodes_as_the_batch_itself(family: ModelFamily) -> None:
    batch = make_batches(1)[0]
    mean, std = family.posterior(batch["pixel_values"])
    text = family.encode_captions(batch["caption"])
    size = torch.tensor([[16, 16]] * 2)
    cached = {name: batch[name] for name in ("original_size", "crop_top_left")}
    cached |= {"latents_mean": mean, "latents_std": std, "text_embeddings": text, "target_size": size}
    latents, conditioning = family.encode(batch, Draws(0, [0, 1]))
    ours, our_conditioning = family.encode(cached, Draws(0, [0, 1]))
    assert torch.equal(latents, ours)
    torch.testing.assert_close(conditioning, our_conditioning, rtol=0, atol=0)


def test_embeddings_of_another_precision_fit_the_base(family: ModelFamily) -> None:
    batch = make_batches(1)[0]
    text = {name: value.bfloat16() for name, value in family.encode_captions(batch["caption"]).items()}
    latents, conditioning = family.encode({**batch, "text_embeddings": text}, Draws(0, [0, 1]))
    assert family.denoise(latents, torch.tensor([1, 999]), conditioning).dtype == torch.float32


def test_quantized_text_encoders_encode_nearly_the_same(family: ModelFamily) -> None:
    full = family.encode_captions(["a red star", "x"])
    for quantization, largest in ((Int8(), 0.02), (NF4(), 0.3)):
        other = type(family)(family.pretrained_model_name_or_path)
        other.text_quantization = quantization
        state = torch.get_rng_state()
        other.load(torch.float32, without={"vae", "denoiser"})
        assert torch.equal(torch.get_rng_state(), state), "what is drawn later must not depend on what is loaded"
        other.denoiser_config = family.denoiser_config
        quantized = {id(layer) for layer in quantized_layers(other)}
        assert quantized == {
            id(layer) for layer in other.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        }
        encoded = other.encode_captions(["a red star", "x"])
        assert encoded.keys() == full.keys()
        for name, value in full.items():
            if value.is_floating_point():
                error = (encoded[name] - value).norm() / value.norm()
                assert 0 < error < largest
            else:
                assert torch.equal(encoded[name], value)
        assert other.identity()["text_quantization"] == repr(quantization)
    assert "text_quantization" not in family.identity()


def test_patterns_that_match_no_layer_of_the_text_encoders(sdxl_folder: Path) -> None:
    family = StableDiffusionXL(str(sdxl_folder))
    family.text_quantization = Int8(skip=["text_encoder_2.*", "text_encoder_3.*"])
    known = (
        r"skip: 'text_encoder_3\.\*' matches none of the \d+ layers that Int8 quantizes.* text_encoder\.encoder\.layers"
    )
    for weights in (True, False):
        with pytest.raises(UserError, match=known):
            family.load(torch.float32, without={"vae", "denoiser"}, weights=weights)
    family.text_quantization = Int8(skip=["text_encoder_2.*"])
    family.load(torch.float32, without={"vae", "denoiser"})
    assert [bool(quantized_layers(family.encoders[name])) for name in ("text_encoder", "text_encoder_2")] == [
        True,
        False,
    ]


def test_several_text_encoders_are_named_before_they_are_used(family: ModelFamily) -> None:
    names = [name for name in family.encoders if name.startswith("text_encoder")]
    assert list(family.encoding_steps(["a red star"])) == (names if len(names) > 1 else ["text"])


def test_floats_and_bytes_encode_alike(family: ModelFamily) -> None:
    batch = make_batches(1)[0]
    floats = {**batch, "pixel_values": batch["pixel_values"].float() / 127.5 - 1}
    draws = Draws(0, [0, 1])
    assert torch.equal(family.encode(batch, draws)[0], family.encode(floats, draws)[0])


def test_captions_matter(family: ModelFamily) -> None:
    batch = make_batches(1)[0]
    draws = Draws(0, [0, 1])
    _, one = family.encode(batch, draws)
    _, other = family.encode({**batch, "caption": ["", ""]}, draws)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(one, other)


def test_encoders_stay_in_evaluation_mode(family: ModelFamily) -> None:
    family.train()
    assert family.denoiser.training
    assert not family.vae.training
    assert not family.encoders["text_encoder"].training


def test_parts_that_are_left_out_come_when_they_are_needed(family: ModelFamily) -> None:
    whole = family
    family = type(whole)(whole.pretrained_model_name_or_path)
    family.load(torch.float32, without={"vae", "text"})
    assert {name.split(".")[0] for name, _ in family.named_parameters()} == {"denoiser"}
    assert family.encoders == {}
    assert family.vae_config == whole.vae_config
    batch = make_batches(1)[0]
    state = torch.get_rng_state()
    with family.all_parts():
        assert not any(p.requires_grad for p in family.vae.parameters())
        torch.testing.assert_close(family.posterior(batch["pixel_values"]), whole.posterior(batch["pixel_values"]))
        torch.testing.assert_close(family.encode_captions(["a"]), whole.encode_captions(["a"]))
        vae, encoder = weakref.ref(family.vae), weakref.ref(family.encoders["text_encoder"])
    assert torch.equal(torch.get_rng_state(), state)
    assert {name.split(".")[0] for name, _ in family.named_parameters()} == {"denoiser"}
    gc.collect()
    assert vae() is None
    assert encoder() is None


def test_all_parts_leaves_loaded_parts_alone(family: ModelFamily) -> None:
    vae, denoiser = family.vae, family.denoiser
    with family.all_parts():
        assert family.vae is vae
    assert family.vae is vae
    assert family.denoiser is denoiser
    family.load(torch.float32)
    assert family.vae is vae
    assert family.denoiser is denoiser


def test_a_part_that_cannot_be_loaded_leaves_nothing(family: ModelFamily, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(family.pretrained_model_name_or_path, folder)
    other = type(family)(str(folder))
    other.load(torch.float32, without={"vae", "text"})
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load 'text_encoder'"), other.all_parts():
        pass
    assert {name for name, _ in other.named_children()} == {"denoiser"}


class TestIdentity:
    """What a cache depends on."""

    @pytest.fixture
    def folder(self, sd_folder: Path, tmp_path: Path) -> Path:
        shutil.copytree(sd_folder, tmp_path / "base")
        return tmp_path / "base"

    def test_a_moved_folder_is_the_same(self, sd_folder: Path, folder: Path) -> None:
        identity = StableDiffusion(str(folder)).identity()
        assert identity == StableDiffusion(str(sd_folder)).identity()
        assert set(identity) == {"vae", "text"}

    def test_the_embedded_base(self) -> None:
        assert set(StableDiffusion("embedded").identity()) == {"vae", "text"}

    @pytest.mark.parametrize(
        ("file", "part"),
        [
            ("vae/diffusion_pytorch_model.safetensors", "vae"),
            ("vae/config.json", "vae"),
            ("text_encoder/model.safetensors", "text"),
            ("tokenizer/tokenizer.json", "text"),
            ("tokenizer/chat_template.jinja", "text"),
            ("tokenizer/additional_chat_templates/default.jinja", "text"),
            ("tokenizer/qwen.tiktoken", "text"),
            ("unet/diffusion_pytorch_model.safetensors", None),
            ("vae/diffusion_pytorch_model.bin", None),
            ("vae/diffusion_pytorch_model.fp16.safetensors", None),
            ("vae/README.md", None),
        ],
    )
    def test_what_it_depends_on(self, folder: Path, file: str, part: str | None) -> None:
        before = StableDiffusion(str(folder)).identity()
        data = bytearray((folder / file).read_bytes() if (folder / file).exists() else b"")
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(data + b" ")
        after = StableDiffusion(str(folder)).identity()
        assert {name for name in before if before[name] != after[name]} == ({part} if part else set())

    def test_one_changed_byte_of_a_small_file(self, folder: Path) -> None:
        before = StableDiffusion(str(folder)).identity()["vae"]
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert StableDiffusion(str(folder)).identity()["vae"] != before

    def test_the_same_vae_in_two_families(self, sd_folder: Path, sdxl_folder: Path, folder: Path) -> None:
        shutil.rmtree(folder / "vae")
        shutil.copytree(sdxl_folder / "vae", folder / "vae")
        theirs = StableDiffusionXL(str(sdxl_folder)).identity()
        assert StableDiffusion(str(folder)).identity()["vae"] == theirs["vae"]
        assert StableDiffusion(str(sd_folder)).identity()["vae"] != theirs["vae"]

    def test_large_files_by_size_and_blocks(self, folder: Path) -> None:
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"

        def identity(size: int, last: bytes = b"\0") -> str:
            with path.open("wb") as file:  # sparse
                file.seek(size - 1)
                file.write(last)
            return StableDiffusion(str(folder)).identity()["vae"]

        size = 40 << 20
        assert len({identity(size), identity(size + 1), identity(size, b"1")}) == 3

    def test_a_part_without_weights_is_not_mentioned(self, folder: Path) -> None:
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        assert set(StableDiffusion(str(folder)).identity()) == {"text"}

    def test_variants(self, folder: Path) -> None:
        plain = StableDiffusion(str(folder)).identity()
        for part in ("vae", "text_encoder"):
            for file in (folder / part).glob("*.safetensors"):
                file.rename(file.with_suffix(".fp16.safetensors"))
        assert StableDiffusion(str(folder), variant="bf16").identity() == {}
        variant = StableDiffusion(str(folder), variant="fp16").identity()
        assert variant == StableDiffusion(str(folder)).identity()
        assert set(variant) == {"vae", "text"}
        assert variant != plain

    def test_hub_ids_stand_for_themselves(self) -> None:
        assert StableDiffusion("someone/model").identity() == dict.fromkeys(("vae", "text"), "someone/model@main")
        identity = StableDiffusion("someone/model", revision="v1", variant="fp16").identity()
        assert identity == dict.fromkeys(("vae", "text"), "someone/model@v1:fp16")


def test_old_vae_configs_get_their_defaults(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "base")
    path = tmp_path / "base" / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    family = StableDiffusion(str(tmp_path / "base"))
    family.load(torch.float32, without={"vae", "text"})
    assert family.vae_config["scaling_factor"] == 0.18215


def test_block_classes_and_default_targets_exist(family: ModelFamily) -> None:
    found = {type(module).__name__ for module in family.denoiser.modules()}
    assert set(family.block_classes) <= found
    names = [name for name, _ in family.denoiser.named_modules()]
    for target in family.default_targets:
        assert any(name.endswith(target) for name in names)


def test_pipeline_draws_with_the_adapted_weights(family: ModelFamily) -> None:
    def draw() -> torch.Tensor:
        pipeline = family.pipeline()
        options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
        generator = torch.Generator().manual_seed(0)
        inputs = {"guidance_scale": 5.0} | family.prompt_inputs(["a star"], 5.0)
        if family.takes_sources:  # this pipeline draws about a megapixel otherwise
            inputs["max_area"] = 32 * 32
        return torch.from_numpy(pipeline(**inputs, generator=generator, **options).images)

    before = draw()
    family.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False))
    assert not torch.allclose(before, draw())


def test_sdxl_conditioning_is_size_crop_and_target(sdxl_folder: Path) -> None:
    family = StableDiffusionXL(str(sdxl_folder))
    family.load(torch.float32)
    batch = make_batches(3)[2]
    _, conditioning = family.encode(batch, Draws(0, [0, 1]))
    assert conditioning["added_cond_kwargs"]["time_ids"].tolist() == [[22, 24, 1, 2, 16, 16]] * 2
    sized = {**batch, "target_size": torch.tensor([[8, 24]] * 2)}
    _, conditioning = family.encode(sized, Draws(0, [0, 1]))
    assert conditioning["added_cond_kwargs"]["time_ids"].tolist() == [[22, 24, 1, 2, 8, 24]] * 2
    bare = {key: batch[key] for key in ("pixel_values", "caption")}
    _, conditioning = family.encode(bare, Draws(0, [0, 1]))
    assert conditioning["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_sdxl_keeps_its_vae_in_float32(sdxl_folder: Path) -> None:
    family = StableDiffusionXL(str(sdxl_folder))
    family.load(torch.bfloat16)
    assert family.vae.dtype == torch.float32
    assert family.denoiser.dtype == torch.bfloat16
    assert family.encoders["text_encoder_2"].dtype == torch.bfloat16


def test_a_folder_without_a_unet(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match=r"has no folder 'unet'.*it holds .*text_encoder"):
        StableDiffusion(str(folder)).load(torch.float32)


def test_a_folder_with_a_broken_part(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="cannot load 'unet'"):
        StableDiffusion(str(folder)).load(torch.float32)
