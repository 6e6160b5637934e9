"""Qwen-Image against its pipeline, and its training step against that of ``train_dreambooth_lora_qwen_image.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import QwenImage
from lit_lora.families.packing import pack
from tests.families.own_pipeline import check_exact_prediction, overfit
from tests.families.test_flow_parity import DENSITIES, Reference, check, module_of
from tests.helpers import make_batches

CAPTIONS = ["a red star on white", "", "two", "a caption that is longer than the others"]


@pytest.fixture
def family(qwen_image_folder: Path) -> QwenImage:
    family = QwenImage(str(qwen_image_folder))
    family.load(torch.float32)
    return family


@pytest.mark.parametrize("tokens", [1024, 20])
def test_captions_are_encoded_as_in_the_pipeline(tokens: int, family: QwenImage) -> None:
    """Also where a caption is cut off, and where no padding is left so that the pipeline gives no mask."""
    family.max_sequence_length = tokens
    pipeline: Any = family.pipeline()
    for captions in (CAPTIONS, CAPTIONS[-1:]):
        ours = family.encode_captions(captions)
        embeddings, mask = pipeline.encode_prompt(captions, max_sequence_length=tokens)
        given = family.conditioning(ours, {}, torch.zeros(len(captions), 4, 8, 8))
        assert torch.equal(given["encoder_hidden_states"], embeddings)
        if mask is None:
            assert given["encoder_hidden_states_mask"] is None
        else:
            assert torch.equal(given["encoder_hidden_states_mask"], mask.bool())
            assert len(set(mask.sum(1).tolist())) >= 3
        assert ours["encoder_hidden_states"].shape == (len(captions), tokens, 32)
        assert not ours["encoder_hidden_states"][~ours["mask"]].any()
    assert (embeddings.shape[1] == tokens) == (tokens == 20)


class QwenImageReference(Reference):
    vae_class = AutoencoderKLQwenImage

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "none")
        self.pipeline: Any = QwenImagePipeline.from_pretrained(folder)
        self.transformer = QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer")

    def adapt(self, targets: tuple[str, ...], state: dict[str, Tensor]) -> None:
        super().adapt(targets, state)
        last = self.transformer.transformer_blocks[-1]
        for layer in (last.attn.add_q_proj, last.attn.to_add_out, last.txt_mlp):  # they get no gradient
            layer.requires_grad_(False)

    def latents(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        pixels, noise = batch["pixel_values"].float() / 127.5 - 1, draws.normal("posterior", (4, 8, 8))
        config: Any = self.vae.config
        posterior = self.vae.encode(pixels.unsqueeze(2)).latent_dist
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        latents = (posterior.mean + posterior.std * noise.unsqueeze(2) - mean) * (1.0 / std)
        return latents.squeeze(2)

    def embeddings(self, captions: list[str]) -> Any:
        return self.pipeline.encode_prompt(captions)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        batch, channels, height, width = noisy.shape
        prediction = self.transformer(
            hidden_states=QwenImagePipeline._pack_latents(noisy.unsqueeze(1), batch, channels, height, width),
            encoder_hidden_states=text[0],
            encoder_hidden_states_mask=text[1],
            timestep=timesteps / 1000,
            img_shapes=[(1, height // 2, width // 2)] * batch,
            return_dict=False,
        )[0]
        return QwenImagePipeline._unpack_latents(prediction, 2 * height, 2 * width, 2).squeeze(2)


def test_the_training_step_is_that_of_the_script(qwen_image_folder: Path) -> None:
    # The script's timesteps are not shifted under dynamic shifting.
    module = module_of(QwenImage(str(qwen_image_folder)), density=DENSITIES["logit_normal"], shift=1.0)
    check(module, QwenImageReference(qwen_image_folder), "logit_normal")


def test_the_exact_velocity_leads_to_the_exact_latents(family: QwenImage) -> None:
    noise, latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    check_exact_prediction(family, noise, latents, noise - latents, pack)


def test_an_image_that_is_learned_is_drawn(family: QwenImage) -> None:
    assert overfit(family, 150, 0.01, pack) < 0.3


def test_padding_does_not_matter(family: QwenImage) -> None:
    """What a cache gives back is denoised as the embeddings themselves; a longer caption in the batch changes nothing."""
    batch = make_batches(1)[0] | {"caption": ["a star", "two blue circles"]}
    text = family.encode_captions(batch["caption"])
    other = {**text, "encoder_hidden_states": torch.where(text["mask"].unsqueeze(-1), text["encoder_hidden_states"], 3)}
    draws, times = Draws(0, batch["slot"]), torch.tensor([100.0, 900.0])
    results = []
    for embeddings in (text, other):
        latents, conditioning = family.encode({**batch, "text_embeddings": embeddings}, draws)
        results.append(family.denoise(latents, times, conditioning))
    assert torch.equal(*results)
    alone = family.conditioning({name: value[:1] for name, value in text.items()}, {}, latents[:1])
    assert alone["encoder_hidden_states_mask"] is None
    torch.testing.assert_close(family.denoise(latents[:1], times[:1], alone), results[0][:1])


def test_guidance_is_classifier_free(family: QwenImage) -> None:
    guided = family.prompt_inputs(["a", "b"], 4.0)
    assert guided["true_cfg_scale"] == 4
    assert guided["negative_prompt"] == ["", ""]
    plain = family.prompt_inputs(["a", "b"], 1.0)
    assert plain == {name: value for name, value in guided.items() if name != "negative_prompt"} | {"true_cfg_scale": 1}


def test_sizes(family: QwenImage) -> None:
    text = {"encoder_hidden_states": torch.zeros(2, 3, 32), "mask": torch.ones(2, 3)}
    assert family.conditioning(text, {}, torch.zeros(2, 4, 8, 6))["img_shapes"] == [[(1, 4, 3)]] * 2
    assert (family.size_multiple, family.default_size, family.num_tokens((4, 8, 6))) == (4, 256, 12)


@pytest.mark.parametrize("tokens", [0, 1025])
def test_too_few_or_many_tokens(tokens: int) -> None:
    with pytest.raises(
        UserError, match=f"max_sequence_length={tokens} is too (small|large); it must be at (least 1|most 1024)"
    ):
        QwenImage("base", max_sequence_length=tokens)


def test_captions_beyond_what_the_tokenizer_reads_are_told(family: QwenImage) -> None:
    family.max_sequence_length = 1024
    with pytest.warns(UserWarning, match="and the text encoder reads 1058, .*: 'aaaa"):
        family.encode_captions(["a" * 1100])
