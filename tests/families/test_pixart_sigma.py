"""PixArt-Sigma against PixArtSigmaPipeline and PixArt's script for LoRA: text, one training step, sampling, conditions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.families import PixArtSigma
from lit_lora.module import LoraDiffusion
from tests.families.own_pipeline import check_exact_prediction, overfit
from tests.families.tiny import pixart_sigma
from tests.helpers import make_batches, save_adapter
from tests.test_parity import adapter_of

CAPTIONS = [" A Red Star", "", "two blue circles and one green square"]


def loaded(folder: Path, **options: Any) -> PixArtSigma:
    family = PixArtSigma(str(folder), **{"max_sequence_length": 24} | options)
    family.load(torch.float32)
    return family


@pytest.fixture
def family(pixart_sigma_folder: Path) -> PixArtSigma:
    return loaded(pixart_sigma_folder)


@pytest.fixture(scope="module")
def with_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose transformer takes resolution and aspect ratio, as the size of 1024 px means if a config is silent."""
    folder = tmp_path_factory.mktemp("models") / "sized"
    return pixart_sigma.write(folder, sample_size=128, use_additional_conditions=None)


def reference_step(folder: Path, module: LoraDiffusion, batch: Any, draws: Draws) -> tuple[float, dict[str, Tensor]]:
    """``train_pixart_lora_hf.py`` of PixArt-alpha (min-SNR off), fp32 on the CPU, with draws given from outside."""
    pipeline: Any = PixArtSigmaPipeline.from_pretrained(folder)
    vae: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    transformer: Any = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=list(PixArtSigma.default_targets))
    transformer.requires_grad_(False)
    inject_adapter_in_model(config, transformer)
    set_peft_model_state_dict(transformer, adapter_of(module))
    with torch.no_grad():
        posterior = vae.encode(batch["pixel_values"].float() / 127.5 - 1).latent_dist
        shape = posterior.mean.shape[1:]
        latents = (posterior.mean + posterior.std * draws.normal("posterior", shape)) * vae.config.scaling_factor
        captions = batch["caption"]
        embeds, mask, _, _ = pipeline.encode_prompt(captions, False, max_sequence_length=24, clean_caption=False)
    noise, t = draws.normal("noise", shape), draws.integers("timestep", 1000)
    alpha = torch.cumprod(1 - torch.linspace(0.0001, 0.008, 1000), 0)[t].view(-1, 1, 1, 1)
    height, width = batch["pixel_values"].shape[-2:]
    sizes: Any = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        sizes = {"resolution": torch.tensor([[height, width]] * len(t)).float()}
        sizes["aspect_ratio"] = torch.full((len(t), 1), height / width)
    prediction = transformer(
        alpha.sqrt() * latents + (1 - alpha).sqrt() * noise,
        encoder_hidden_states=embeds,
        encoder_attention_mask=mask,
        timestep=t,
        added_cond_kwargs=sizes,
    ).sample.chunk(2, 1)[0]
    loss = F.mse_loss(prediction, noise)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("sized", [False, True])
def test_a_step_is_that_of_the_script(sized: bool, pixart_sigma_folder: Path, with_sizes: Path) -> None:
    folder = with_sizes if sized else pixart_sigma_folder
    torch.manual_seed(9)
    adapter = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
    family = PixArtSigma(str(folder), max_sequence_length=24)
    module = LoraDiffusion(family, adapter, base_dtype="float32")
    module.configure_model()
    module.train()
    batch = make_batches(1)[0]
    batch["pixel_values"] = torch.cat([batch["pixel_values"]] * 2, dim=-1)[..., :24].clone()  # 16 x 24 px
    loss, gradients = reference_step(folder, module, batch, Draws(5, batch["slot"]))
    losses, _ = module.losses(batch, Draws(5, batch["slot"]))
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(loss, rel=1e-5)
    ours = {name: p.grad for name, p in family.denoiser.get_base_model().named_parameters() if p.requires_grad}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any()
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("tokens", [24, 300])
def test_text_is_that_of_the_pipeline(tokens: int, family: PixArtSigma) -> None:
    family.max_sequence_length = tokens
    pipeline: Any = family.pipeline()
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(CAPTIONS, max_sequence_length=tokens)
    empty = family.encode_captions([""] * 3)
    for text, expected, expected_mask in (
        (family.encode_captions(CAPTIONS), embeds, mask),
        (empty, negative, negative_mask),
    ):
        assert torch.equal(text["encoder_hidden_states"], expected)
        assert torch.equal(text["mask"], expected_mask)
    assert len(set(mask.sum(1).tolist())) == 3


def test_exact_noise_gives_the_exact_latents(family: PixArtSigma) -> None:
    noise, latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = family.pipeline().scheduler
    scheduler.set_timesteps(3)
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[0]]
    start = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    variance = torch.full_like(noise, 7.0)
    check_exact_prediction(family, start, latents, noise, to_answer=lambda answer: torch.cat([answer, variance], dim=1))


def test_an_image_that_is_learned_is_drawn(family: PixArtSigma) -> None:
    assert overfit(family, 300, 0.02) < 0.5


def test_padding_does_not_matter(family: PixArtSigma) -> None:
    """What a cache gives back, embeddings with zeros for padding, is denoised as the embeddings themselves."""
    batch = make_batches(1)[0] | {"caption": ["a star", ""]}
    text = family.encode_captions(batch["caption"])
    kept = text["encoder_hidden_states"] * text["mask"][..., None]
    results = []
    for hidden in (text["encoder_hidden_states"], kept, kept * 0):
        embeddings = {**text, "encoder_hidden_states": hidden}
        latents, conditioning = family.encode({**batch, "text_embeddings": embeddings}, Draws(0, batch["slot"]))
        results.append(family.denoise(latents, torch.tensor([100, 900]), conditioning))
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(results[2], results[0])


@pytest.mark.parametrize("sized", [False, True])
def test_an_adapter_in_the_plain_pipeline(
    sized: bool, pixart_sigma_folder: Path, with_sizes: Path, tmp_path: Path
) -> None:
    """PEFT loads it, since diffusers has no LoRA files for PixArt; those that take sizes are drawn by PixArt-Alpha's pipeline."""
    folder = with_sizes if sized else pixart_sigma_folder
    family = loaded(folder)
    family.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False))
    size = {"height": 16, "width": 24, "num_inference_steps": 3, "guidance_scale": 3.0}
    ours = np.asarray(family.generate(["A star"], [7], **size)[0]).astype(int)
    save_adapter(family, tmp_path)
    kind: Any = PixArtAlphaPipeline if sized else PixArtSigmaPipeline
    pipeline = kind.from_pretrained(folder)
    options = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24, "output_type": "np"}
    base = pipeline("A star", generator=torch.Generator().manual_seed(7), **size, **options).images[0] * 255
    PeftModel.from_pretrained(pipeline.transformer, tmp_path)
    theirs = pipeline("A star", generator=torch.Generator().manual_seed(7), **size, **options).images[0] * 255
    assert np.abs(ours - np.round(theirs)).max() <= 1
    assert np.abs(theirs - base).max() > 4


def test_configs_of_the_published_models(pixart_sigma_folder: Path, tmp_path: Path) -> None:
    """They name a class that has become several, and entries that are ignored."""
    shutil.copytree(pixart_sigma_folder, tmp_path / "base")
    path = tmp_path / "base" / "transformer" / "config.json"
    older = {"_class_name": "Transformer2DModel", "double_self_attention": False, "num_vector_embeds": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | older))
    module = LoraDiffusion(PixArtSigma(str(tmp_path / "base")), LoraConfig(r=2), base_dtype="float32")
    module.configure_model()
    plain = PixArtTransformer2DModel.from_pretrained(pixart_sigma_folder, subfolder="transformer")
    ours = module.family.denoiser.get_base_model()
    assert torch.equal(ours.proj_out.weight, plain.proj_out.weight)
