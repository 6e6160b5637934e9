"""Chroma against ChromaPipeline: text, mask, one training step, sampling, and the distilled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import Chroma
from lit_lora.memory.options import MemoryOptions
from tests.families.own_pipeline import check_exact_prediction, overfit
from tests.families.test_flow_parity import DENSITIES, Reference, check, module_of
from tests.helpers import make_batches

CAPTIONS = ["a red star", "", "two blue circles and one green square"]


def packed(latents: Tensor) -> Tensor:
    return ChromaPipeline._pack_latents(latents, *latents.shape)


@pytest.fixture
def family(chroma_folder: Path) -> Chroma:
    family = Chroma(str(chroma_folder), max_sequence_length=24)
    family.load(torch.float32)
    return family


class ChromaReference(Reference):
    """FLUX.1's script with Chroma's pipeline, whose mask is boolean here, as in Chroma's own training code."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "none")
        self.pipeline: Any = ChromaPipeline.from_pretrained(folder)
        self.transformer = ChromaTransformer2DModel.from_pretrained(folder, subfolder="transformer")

    def embeddings(self, captions: list[str]) -> Any:
        return self.pipeline.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=24)[:3]

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        embeds, text_ids, mask = text
        batch, _, height, width = noisy.shape
        tokens = height // 2 * (width // 2)
        prediction = self.transformer(
            hidden_states=packed(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=self.pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
            attention_mask=self.pipeline._prepare_attention_mask(batch, tokens, noisy.dtype, mask.bool()),
            return_dict=False,
        )[0]
        unpacked: Tensor = ChromaPipeline._unpack_latents(prediction, height * 2, width * 2, 2)
        return unpacked


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_the_pipeline(checkpointing: bool, chroma_folder: Path) -> None:
    """Also with gradient checkpointing, under which diffusers leaves the mask out of single blocks."""
    module = module_of(Chroma(str(chroma_folder), max_sequence_length=24), density=DENSITIES["logit_normal"])
    module.memory = MemoryOptions(gradient_checkpointing=checkpointing)
    check(module, ChromaReference(chroma_folder), "logit_normal")


@pytest.mark.parametrize("tokens", [24, 512])
def test_text_is_that_of_the_pipeline(tokens: int, family: Chroma) -> None:
    family.max_sequence_length = tokens
    pipeline: Any = family.pipeline()
    embeds, _, mask, negative, _, negative_mask = pipeline.encode_prompt(CAPTIONS, max_sequence_length=tokens)
    ours, empty = family.encode_captions(CAPTIONS), family.encode_captions([""] * 3)
    for text, expected, expected_mask in ((ours, embeds, mask), (empty, negative, negative_mask)):
        assert torch.equal(text["encoder_hidden_states"], expected)
        assert torch.equal(text["mask"].float(), expected_mask)
    lengths = [min(len(family.encoders["tokenizer"](caption).input_ids) + 1, tokens) for caption in CAPTIONS]
    assert ours["mask"].sum(1).tolist() == lengths
    assert len(set(lengths)) == 3


def test_an_exact_velocity_gives_the_exact_latents(family: Chroma) -> None:
    noise, latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    check_exact_prediction(family, noise, latents, noise - latents, packed)


def test_an_image_that_is_learned_is_drawn(family: Chroma) -> None:
    assert overfit(family, 200, 0.02, packed) < 0.3


def test_padding_does_not_matter(family: Chroma) -> None:
    """What a cache gives back, embeddings with zeros for padding, is denoised as the embeddings themselves."""
    batch = make_batches(1)[0] | {"caption": ["a star", ""]}
    text = family.encode_captions(batch["caption"])
    kept = text["encoder_hidden_states"] * text["mask"][..., None]
    one_more = kept * (torch.arange(24) < text["mask"].sum(1, keepdim=True) - 1)[..., None]
    results = []
    for hidden in (text["encoder_hidden_states"], kept, one_more):
        embeddings = {**text, "encoder_hidden_states": hidden}
        latents, conditioning = family.encode({**batch, "text_embeddings": embeddings}, Draws(0, batch["slot"]))
        results.append(family.denoise(latents, torch.tensor([100.0, 900.0]), conditioning))
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(results[2], results[0])  # the first token of the padding counts


def test_the_pipeline_gets_a_boolean_mask(family: Chroma) -> None:
    """Of prompts it would make floats, which attention adds to its scores."""
    pipeline: Any = family.pipeline()
    inputs = family.prompt_inputs(["a star", "b"], 3.0)
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        assert pipeline._prepare_attention_mask(2, 16, torch.float32, inputs[name]).dtype == torch.bool
    assert inputs.keys() - family.prompt_inputs(["a star", "b"], 1.0).keys() == {
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    }


def test_the_distilled_model_is_told_by_its_name(chroma_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "Chroma1-Flash").symlink_to(chroma_folder)
    for folder, distilled in ((chroma_folder, False), (tmp_path / "Chroma1-Flash", True)):
        family = Chroma(str(folder))
        family.read_configs()
        assert family.is_distilled is distilled


@pytest.mark.parametrize("tokens", [0, 513])
def test_too_few_or_many_tokens(tokens: int) -> None:
    with pytest.raises(
        UserError, match=f"max_sequence_length={tokens} is too (small|large); it must be at (least 1|most 512)"
    ):
        Chroma("base", max_sequence_length=tokens)
