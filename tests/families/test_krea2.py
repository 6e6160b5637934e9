"""Krea 2 against its pipeline, and its training step against that of ``train_dreambooth_lora_krea2.py``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import Krea2
from lit_lora.families.packing import pack
from tests.families.own_pipeline import check_exact_prediction, overfit
from tests.families.test_flow_parity import DENSITIES, Reference, check, module_of
from tests.families.test_qwen_image import QwenImageReference
from tests.helpers import make_batches

CAPTIONS = ["a red star on white", "", "two", "a caption that is longer than all of the others together"]


@pytest.fixture
def family(krea2_folder: Path) -> Krea2:
    family = Krea2(str(krea2_folder), max_sequence_length=40)
    family.load(torch.float32)
    return family


def test_captions_are_encoded_as_in_the_pipeline(family: Krea2) -> None:
    """The pipeline has padding before the end of the template, and the family after it."""
    pipeline: Any = family.pipeline()
    ours = family.encode_captions(CAPTIONS)
    embeddings, mask = pipeline.encode_prompt(CAPTIONS, max_sequence_length=40)
    assert ours["encoder_hidden_states"].shape == embeddings.shape == (4, 40, 2, 32)
    for one, own_mask, other, their_mask in zip(*ours.values(), embeddings, mask, strict=True):
        assert torch.equal(one[own_mask], other[their_mask])
    assert len(set(mask.sum(1).tolist())) == 4
    assert torch.equal(ours["mask"], mask.sort(dim=1, descending=True).values)
    assert not ours["encoder_hidden_states"][~ours["mask"]].any()
    assert bool(ours["mask"][-1].all())  # cut off


class Krea2Reference(QwenImageReference):
    def __init__(self, folder: Path) -> None:
        Reference.__init__(self, folder, "none")
        self.pipeline: Any = Krea2Pipeline.from_pretrained(folder)
        self.transformer = Krea2Transformer2DModel.from_pretrained(folder, subfolder="transformer")

    def adapt(self, targets: tuple[str, ...], state: dict[str, Tensor]) -> None:
        Reference.adapt(self, targets, state)

    def embeddings(self, captions: list[str]) -> Any:
        return self.pipeline.encode_prompt(captions, max_sequence_length=40)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Any) -> Tensor:
        batch, channels, height, width = noisy.shape
        prediction = self.transformer(
            hidden_states=self.pipeline._pack_latents(noisy.unsqueeze(1), batch, channels, height, width),
            encoder_hidden_states=text[0],
            timestep=timesteps / 1000,
            position_ids=Krea2Pipeline.prepare_position_ids(40, height // 2, width // 2, torch.device("cpu")),
            encoder_attention_mask=text[1],
            return_dict=False,
        )[0]
        unpacked: Tensor = self.pipeline._unpack_latents(prediction, 2 * height, 2 * width)
        return unpacked.squeeze(2)


def test_the_training_step_is_that_of_the_script(krea2_folder: Path) -> None:
    # The script's timesteps are not shifted under dynamic shifting.
    family = Krea2(str(krea2_folder), max_sequence_length=40)
    module = module_of(family, density=DENSITIES["logit_normal"], shift=1.0)
    check(module, Krea2Reference(krea2_folder), "logit_normal")


def test_the_exact_velocity_leads_to_the_exact_latents(family: Krea2) -> None:
    noise, latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    check_exact_prediction(family, noise, latents, noise - latents, pack)


def test_an_image_that_is_learned_is_drawn(family: Krea2) -> None:
    assert overfit(family, 150, 0.01, pack) < 0.3


def test_padding_does_not_matter(family: Krea2) -> None:
    """What a cache gives back is denoised as the embeddings themselves; a longer caption in the batch changes nothing."""
    batch = make_batches(1)[0] | {"caption": ["a star", "two blue circles"]}
    text = family.encode_captions(batch["caption"])
    real = text["mask"][..., None, None]
    other = {**text, "encoder_hidden_states": torch.where(real, text["encoder_hidden_states"], 3)}
    draws, times = Draws(0, batch["slot"]), torch.tensor([100.0, 900.0])
    results = []
    for embeddings in (text, other):
        latents, conditioning = family.encode({**batch, "text_embeddings": embeddings}, draws)
        results.append(family.denoise(latents, times, conditioning))
    assert torch.equal(*results)
    alone = family.conditioning({name: value[:1] for name, value in text.items()}, {}, latents[:1])
    assert alone["encoder_attention_mask"] is None
    torch.testing.assert_close(family.denoise(latents[:1], times[:1], alone), results[0][:1])


def test_guidance_is_counted_from_zero_in_the_pipeline(family: Krea2) -> None:
    assert [family.prompt_inputs(["a"], scale)["guidance_scale"] for scale in (0.5, 1.0, 5.5)] == [0, 0, 4.5]


def test_settings_of_the_pipeline(krea2_folder: Path, tmp_path: Path) -> None:
    """The layers of the text encoder and the distillation are in ``model_index.json``."""
    raw = Krea2(str(krea2_folder))
    raw.read_configs()
    assert not raw.is_distilled
    assert raw.pipeline_options == {"text_encoder_select_layers": (1, 3), "is_distilled": False}
    turbo = tmp_path / "base"
    shutil.copytree(krea2_folder, turbo)
    index = json.loads((turbo / "model_index.json").read_text()) | {"is_distilled": True}
    del index["text_encoder_select_layers"]
    (turbo / "model_index.json").write_text(json.dumps(index))
    distilled = Krea2(str(turbo))
    distilled.read_configs()
    assert distilled.is_distilled
    assert distilled.pipeline_options == {"text_encoder_select_layers": tuple(range(2, 36, 3)), "is_distilled": True}
    assert distilled.identity()["text"] != raw.identity()["text"]


def test_sizes(family: Krea2) -> None:
    assert (family.size_multiple, family.default_size, family.num_tokens((4, 8, 6))) == (4, 1024, 12)
    text = {"encoder_hidden_states": torch.zeros(2, 3, 2, 32), "mask": torch.ones(2, 3)}
    positions = family.conditioning(text, {}, torch.zeros(2, 4, 8, 6))["position_ids"]
    assert positions.shape == (3 + 4 * 3, 3)
    assert positions[-1].tolist() == [0, 3, 2]


def test_too_few_tokens() -> None:
    with pytest.raises(UserError, match="max_sequence_length=5 is too small; it must be at least 6"):
        Krea2("base", max_sequence_length=5)
