"""FLUX.1 Kontext: the training step, what it draws, and which data it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from lit_lora.callbacks import SampleImages
from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import Flux, FluxKontext, check_batch, prepare, source_images
from lit_lora.objectives import FlowMatching
from lit_lora.planning.plan_run import plan_run
from tests.families.test_flow_parity import DENSITIES, FluxReference, check, module_of
from tests.helpers import make_batches


def pairs(count: int, size: int = 16) -> list[dict[str, Any]]:
    """Batches of pairs of random images."""
    sources = make_batches(count, size=size, seed=11)
    batches = make_batches(count, size=size)
    return [{**b, "source_pixel_values": s["pixel_values"]} for b, s in zip(batches, sources, strict=True)]


class KontextReference(FluxReference):
    """The tokens and positions that the pipeline itself prepares for a source image."""

    def __init__(self, folder: Path, *args: Any) -> None:
        super().__init__(folder, *args)
        self.edits = FluxKontextPipeline.from_pretrained(folder)

    def latents(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        pixels = batch["source_pixel_values"].float() / 127.5 - 1
        shape = (len(pixels), 4, 16, 16, torch.float32, torch.device("cpu"), torch.Generator())
        _, self.source, ids, source_ids = self.edits.prepare_latents(pixels, *shape)
        self.ids = torch.cat([ids, source_ids])
        return super().latents(batch, draws)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        embeds, pooled, text_ids = text
        batch, channels, height, width = noisy.shape
        tokens = FluxKontextPipeline._pack_latents(noisy, batch, channels, height, width)
        prediction = self.transformer(
            hidden_states=torch.cat([tokens, self.source], dim=1),
            timestep=timesteps / 1000,
            guidance=torch.tensor([self.guidance_scale]).expand(batch),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=self.ids,
            return_dict=False,
        )[0][:, : tokens.shape[1]]
        unpacked: Tensor = FluxKontextPipeline._unpack_latents(prediction, height * 2, width * 2, 2)
        return unpacked


def test_the_training_step_is_that_of_the_pipeline(flux_kontext_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FluxKontext(str(flux_kontext_folder), train_guidance_scale=3.5, max_sequence_length=24)
    monkeypatch.setattr("tests.families.test_flow_parity.make_batches", pairs)
    module = module_of(family, density=DENSITIES["logit_normal"], shift=1.0)
    check(module, KontextReference(flux_kontext_folder, "none"), "logit_normal")


@pytest.fixture
def family(flux_kontext_folder: Path) -> FluxKontext:
    family = FluxKontext(str(flux_kontext_folder))
    prepare(family, FlowMatching())
    family.load(torch.float32)
    return family


def test_cached_sources_are_those_of_the_images(family: FluxKontext) -> None:
    batch = pairs(1)[0]
    mean, std = family.posterior(batch["pixel_values"])
    cached = {"latents_mean": mean, "latents_std": std, "caption": batch["caption"]}
    cached["source_latents"] = family.posterior(batch["source_pixel_values"])[0]
    check_batch(family, cached, values=True)
    draws = Draws(0, [0, 1])
    torch.testing.assert_close(family.encode(cached, draws), family.encode(batch, draws), rtol=0, atol=0)


def test_a_pair_is_learned(flux_kontext_folder: Path) -> None:
    family = FluxKontext(str(flux_kontext_folder), max_sequence_length=8)
    objective = FlowMatching()
    prepare(family, objective)
    family.load(torch.float32)
    batch = {name: value[:1] for name, value in pairs(1)[0].items()}
    with torch.no_grad():
        latents, conditioning = family.encode(batch, Draws(0, [0]))
    family.denoiser.requires_grad_(True)
    optimizer = torch.optim.Adam(family.denoiser.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        sample = objective.sample(latents, Draws(0, [0]))
        loss = objective.loss(family.denoise(sample.noisy, sample.timesteps, conditioning), sample).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_images_are_drawn_from_their_sources_in_the_size_that_is_asked_for(family: FluxKontext) -> None:
    """As the pipeline draws them from images of that size; others cover it and are cropped at the center."""
    options: dict[str, Any] = {"height": 16, "width": 32, "num_inference_steps": 2}
    sources = [Image.effect_noise((32, 16), 90).convert("RGB"), Image.new("RGB", (32, 16), "red")]
    drawn = family.generate(["edit it"] * 2, [7, 7], sources=sources, guidance_scale=2.0, **options)
    assert [image.size for image in drawn] == [(32, 16)] * 2
    assert drawn[0].tobytes() != drawn[1].tobytes()
    pipeline = family.pipeline()
    for image, source in zip(drawn, sources, strict=True):
        generator = torch.Generator().manual_seed(7)
        inputs = {"image": source, "prompt": "edit it", "guidance_scale": 2.0, "max_area": 512, "_auto_resize": False}
        (wanted,) = pipeline(**inputs, **options, generator=generator).images
        assert np.abs(np.asarray(image).astype(int) - np.asarray(wanted)).max() <= 1
    wide = Image.new("RGB", (96, 40), "green")
    wide.paste(sources[1].resize((80, 40)), (8, 0))
    again = family.generate(["edit it"], [7], sources=[wide], guidance_scale=2.0, **options)
    assert np.abs(np.asarray(again[0]).astype(int) - np.asarray(drawn[1])).max() <= 1


def test_predict_and_samples_edit_the_sources(
    flux_kontext_folder: Path, flux_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module = module_of(FluxKontext(str(flux_kontext_folder), max_sequence_length=8))
    module.configure_model()
    [batch] = pairs(1)
    drawn: list[dict[str, Any]] = []
    other: Any = module
    module.trainer = Trainer(**trainer_options)

    def generate(prompts: list[str], *args: Any, **options: Any) -> list[Any]:
        drawn.append(options)
        return [None] * len(prompts)

    other.generate = generate
    module.predict_step({**batch, "slot": [0] * len(batch["caption"])}, 0)
    for image, pixels in zip(drawn[0]["sources"], batch["source_pixel_values"], strict=True):
        assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())
    with pytest.raises(UserError, match="latents from a cache, and the pipeline edits images: predict over shards"):
        source_images({"source_latents": torch.zeros(1)})
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    prompts = tmp_path / "p.yaml"
    prompts.write_text("- {prompt: edit, image: red.png}")
    sampler = SampleImages(str(prompts), height=16, width=16)
    with pytest.raises(
        UserError, match="a prompt has an image to edit, and Flux draws from text alone; leave image out"
    ):
        sampler.setup(Trainer(**trainer_options), module_of(Flux(str(flux_folder), max_sequence_length=8)), "fit")
    sampler.setup(Trainer(**trainer_options), module, "fit")
    sampler._drawn(Trainer(**trainer_options), module)
    assert [one.getpixel((0, 0)) for one in drawn[1]["sources"]] == [(255, 0, 0)]


def test_the_plan_counts_the_tokens_of_sources(flux_folder: Path, flux_kontext_folder: Path) -> None:
    ours, flux = (
        plan_run(module_of(kind(str(folder), max_sequence_length=8)), 1, 64, 64)
        for kind, folder in ((FluxKontext, flux_kontext_folder), (Flux, flux_folder))
    )
    assert ours.flops_per_step > 1.7 * flux.flops_per_step


def test_pairs_are_refused_by_other_families(flux_folder: Path, family: FluxKontext) -> None:
    batch, other = pairs(1)[0], Flux(str(flux_folder))
    other.read_configs()
    with pytest.raises(UserError, match=r"has source_pixel_values, and Flux trains text to image.* FluxKontext"):
        check_batch(other, batch, values=False)
    check_batch(family, batch, values=True)
    batch["source_pixel_values"] = batch["source_pixel_values"][..., :8]
    with pytest.raises(UserError, match=r"source_pixel_values is \(2, 3, 16, 8\), not a tensor \(2, 3, 16, 16\)"):
        check_batch(family, batch, values=False)


def test_the_pipeline_decides_the_family(flux_folder: Path, flux_kontext_folder: Path) -> None:
    for kind, folder, wanted in ((Flux, flux_kontext_folder, "FluxKontext"), (FluxKontext, flux_folder, "Flux")):
        with pytest.raises(UserError, match=rf"{kind.__name__} cannot train .*: use family {wanted}$"):
            prepare(kind(str(folder)), FlowMatching())
