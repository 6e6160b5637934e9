"""FLUX.2 dev and klein against their pipelines, and their training steps against those of diffusers' scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import Flux2, prepare
from lit_lora.families.packing import pack
from lit_lora.objectives import FlowMatching
from tests.families.own_pipeline import Convert, check_exact_prediction, overfit
from tests.families.single_files import write_single_file
from tests.families.test_flow_parity import DENSITIES, Reference, check, module_of
from tests.families.tiny import flux2
from tests.helpers import make_batches

CAPTIONS = ["a red star on white", "", "two", "[IMG] a caption that is longer than all of the others " * 8]


@pytest.fixture(scope="module")
def folders(flux2_folder: Path, flux2_klein_folder: Path) -> dict[str, Path]:
    """The folders of a dev and a klein."""
    return {"dev": flux2_folder, "klein": flux2_klein_folder}


@pytest.fixture(scope="module", params=["dev", "klein"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def family(folder: Path) -> Flux2:
    return loaded(folder)


def loaded(folder: Path, **options: Any) -> Flux2:
    family = Flux2(str(folder), **{"max_sequence_length": 48} | options)
    family.load(torch.float32)
    return family


def denormalized(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """The VAE's own latents, as the pipelines make them of the denoiser's."""
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config["batch_norm_eps"])
    patches = Flux2Pipeline._patchify_latents(latents) * std + vae.bn.running_mean.view(1, -1, 1, 1)
    return Flux2Pipeline._unpatchify_latents(patches)


class Flux2Reference(Reference):
    """``train_dreambooth_lora_flux2.py`` and ``…_flux2_klein.py``, fp32 on the CPU, with draws given from outside."""

    def __init__(self, folder: Path) -> None:
        self.vae_class = AutoencoderKLFlux2
        super().__init__(folder, "none")
        kind: Any = Flux2KleinPipeline if "klein" in str(folder) else Flux2Pipeline
        self.pipeline = kind.from_pretrained(folder)
        self.transformer = Flux2Transformer2DModel.from_pretrained(folder, subfolder="transformer")

    def adapt(self, targets: tuple[str, ...], state: dict[str, Tensor]) -> None:
        """Adapt layers by their full names: ``attn.to_out`` is a list in double blocks."""
        layers = sorted({name.partition(".lora_")[0] for name in state})
        assert {layer for layer in layers if not layer.endswith(targets)} == set()
        self.transformer.requires_grad_(False)
        self.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers))
        set_peft_model_state_dict(self.transformer, state)

    def latents(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        posterior = self.vae.encode(batch["pixel_values"].float() / 127.5 - 1).latent_dist
        drawn = posterior.mean + posterior.std * draws.normal("posterior", (4, 8, 8))
        mean = self.vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps)
        return Flux2Pipeline._unpatchify_latents((Flux2Pipeline._patchify_latents(drawn) - mean) / std)

    def embeddings(self, captions: list[str]) -> Any:
        return self.pipeline.encode_prompt(captions, max_sequence_length=48)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        patches = Flux2Pipeline._patchify_latents(noisy)
        ids = Flux2Pipeline._prepare_latent_ids(patches)
        guidance = torch.full([1], 3.5).expand(len(noisy)) if self.transformer.config.guidance_embeds else None
        prediction = self.transformer(
            hidden_states=Flux2Pipeline._pack_latents(patches),
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=text[0],
            txt_ids=text[1],
            img_ids=ids,
            return_dict=False,
        )[0]
        return Flux2Pipeline._unpatchify_latents(Flux2Pipeline._unpack_latents_with_ids(prediction, ids))


def test_the_training_step_is_that_of_the_script(folder: Path) -> None:
    # The scripts' timesteps are not shifted under dynamic shifting.
    family = Flux2(str(folder), max_sequence_length=48)
    module = module_of(family, density=DENSITIES["logit_normal"], shift=1.0)
    check(module, Flux2Reference(folder), "logit_normal")


@pytest.mark.parametrize("tokens", [48, 512])
def test_captions_are_encoded_as_in_the_pipeline(tokens: int, family: Flux2) -> None:
    """Padding included; the longest caption is cut off at 48 tokens."""
    family.max_sequence_length = tokens
    pipeline: Any = family.pipeline()
    embeddings, ids = pipeline.encode_prompt(CAPTIONS, max_sequence_length=tokens)
    ours = family.encode_captions(CAPTIONS)
    assert torch.equal(ours["encoder_hidden_states"], embeddings)
    assert embeddings.shape == (4, tokens, 48)
    conditioning = family.conditioning(ours, {}, torch.zeros(4, 4, 8, 6))
    assert torch.equal(conditioning["txt_ids"], ids[0])
    patches = Flux2Pipeline._patchify_latents(torch.zeros(4, 4, 8, 6))
    assert torch.equal(conditioning["img_ids"], Flux2Pipeline._prepare_latent_ids(patches)[0])


def drawn_by(family: Flux2) -> Convert:
    """The function from latents to those that the pipeline gives: dev the denoiser's tokens, klein the VAE's own latents."""
    return pack if family.denoiser_config["guidance_embeds"] else lambda latents: denormalized(family.vae, latents)


def test_the_exact_velocity_leads_to_the_exact_latents(family: Flux2) -> None:
    noise, latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    patchify = Flux2Pipeline._patchify_latents
    check_exact_prediction(family, noise, latents, noise - latents, patchify, pack, drawn_by(family))


def test_an_image_that_is_learned_is_drawn(folder: Path) -> None:
    family = loaded(folder, max_sequence_length=8, train_guidance_scale=1.0)
    assert overfit(family, 150, 0.01, drawn_by(family)) < 0.3


def test_latents_are_normalized_by_the_statistics_of_each_place_in_a_patch(family: Flux2) -> None:
    images = make_batches(1)[0]["pixel_values"].float() / 127.5 - 1
    own = family.vae.encode(images).latent_dist
    mean, std = family.posterior(images)
    torch.testing.assert_close(denormalized(family.vae, mean), own.mean)
    scale = denormalized(family.vae, torch.ones_like(std)) - denormalized(family.vae, torch.zeros_like(std))
    torch.testing.assert_close(std * scale, own.std)
    assert not torch.allclose(scale[..., ::2, :], scale[..., 1::2, :])
    torch.testing.assert_close(family.decode(mean), family.vae.decode(own.mean).sample)


def test_a_base_in_half_precision_takes_the_statistics_in_full(folders: dict[str, Path]) -> None:
    family = loaded(folders["klein"])
    images = make_batches(1)[0]["pixel_values"]
    expected, _ = family.posterior(images)
    half = Flux2(str(folders["klein"]))
    half.load(torch.bfloat16, without={"text", "denoiser"})
    mean, std = half.posterior(images)
    assert mean.dtype == std.dtype == torch.bfloat16
    torch.testing.assert_close(mean.float(), expected, rtol=0.05, atol=0.05)


def test_dev_takes_guidance_as_an_input(folders: dict[str, Path]) -> None:
    text, latents = {"encoder_hidden_states": torch.zeros(2, 3, 48)}, torch.zeros(2, 4, 8, 8)
    dev, klein = (loaded(folders[name], train_guidance_scale=2.0) for name in ("dev", "klein"))
    assert dev.conditioning(text, {}, latents)["guidance"].tolist() == [2, 2]
    assert klein.conditioning(text, {}, latents)["guidance"] is None
    assert Flux2("base").train_guidance_scale == 3.5
    assert [dev.sampling_passes(scale) for scale in (1.0, 4.0)] == [1, 1]
    assert [klein.sampling_passes(scale) for scale in (1.0, 4.0)] == [1, 2]


def test_klein_is_distilled_unless_it_is_a_base(folders: dict[str, Path], tmp_path: Path) -> None:
    base, distilled = folders["klein"], flux2.write(tmp_path / "klein", klein=True, distilled=True)
    prepare(Flux2(str(base)), FlowMatching())  # a warning would be an error
    family = Flux2(str(distilled))
    with pytest.warns(
        UserWarning, match=r"is distilled .* train on the base of its size, .*/FLUX\.2-klein-base-4B or -9B"
    ):
        prepare(family, FlowMatching())
    family.load(torch.float32)
    assert family.sampling_passes(4.0) == 1
    assert family.prompt_inputs(["a"], 4.0)["guidance_scale"] == 1
    assert family.pipeline().config["is_distilled"] is True
    for name, expected in (("FLUX.2-klein-9B", True), ("FLUX.2-klein-base-9B", False), ("FLUX.2-dev", False)):
        (tmp_path / name).symlink_to(base)
        named = Flux2(str(tmp_path / name))
        named.read_configs()
        assert named.is_distilled is expected


def test_each_model_has_its_own_text_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    kinds = {name: Flux2(str(folder)).base_encoders["text_encoder"].__name__ for name, folder in folders.items()}
    assert kinds == {"dev": "Mistral3ForConditionalGeneration", "klein": "Qwen3ForCausalLM"}
    for folder in folders.values():
        index = json.loads((folder / "model_index.json").read_text())
        assert type(loaded(folder).pipeline()).__name__ == index["_class_name"]


def test_klein_in_one_file(folders: dict[str, Path], tmp_path: Path) -> None:
    """Diffusers takes every file of FLUX.2 for dev; what it is, the config tells."""
    klein = loaded(folders["klein"])
    file = write_single_file(tmp_path / "x.safetensors", Flux2, folders["klein"], whole=False, prefix="")
    family = loaded(file, config=str(folders["klein"]))
    found, expected = family.denoiser.state_dict(), klein.denoiser.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert torch.equal(family.vae.bn.running_var, klein.vae.bn.running_var)
    assert type(family.pipeline()) is Flux2KleinPipeline
    with pytest.raises(UserError, match=r"x\.safetensors does not .*Flux2Transformer2DModel"):
        loaded(file, config=str(folders["dev"]))


def test_names_of_the_published_models() -> None:
    for blocks, name in (((8, 48), "dev"), ((8, 24), "klein-9b"), ((5, 20), "klein-4b")):
        spec = Flux2.model_spec(dict(zip(("num_layers", "num_single_layers"), blocks, strict=True)))
        assert spec["modelspec.architecture"] == f"Flux.2-{name}"


def test_sizes(family: Flux2) -> None:
    assert (family.size_multiple, family.default_size, family.num_tokens((4, 8, 6))) == (4, 256, 12)
    assert family.latent_shape(16, 32) == (4, 8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": 513}, "max_sequence_length=513 is too large; it must be at most 512"),
        ({"train_guidance_scale": -1}, "train_guidance_scale=-1 is too small; it must be at least 0"),
    ],
)
def test_options_that_are_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Flux2("base", **options)
