"""Parts of text encoders that no family needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Mistral3ForConditionalGeneration, Qwen2_5_VLForConditionalGeneration, Qwen3VLModel

from lit_lora.families import Flux2, Krea2, ModelFamily, QwenImage
from tests.families.folders import FOLDERS

ENCODERS: dict[type[ModelFamily], tuple[type[Any], tuple[str, ...]]] = {
    QwenImage: (Qwen2_5_VLForConditionalGeneration, ("lm_head.", "model.visual.")),
    Krea2: (Qwen3VLModel, ("visual.",)),
    Flux2: (
        Mistral3ForConditionalGeneration,
        ("lm_head.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
}


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.__name__)
def test_embeddings_are_those_of_the_whole_encoder(kind: type[ModelFamily], request: pytest.FixtureRequest) -> None:
    family = kind(str(request.getfixturevalue(FOLDERS[kind])))
    family.load(torch.float32, without={"vae", "denoiser"})
    reduced = family.encoders["text_encoder"]
    ours = family.encode_captions(["a red star", "x"])
    whole_class, parts = ENCODERS[kind]
    assert isinstance(reduced, whole_class)
    whole = whole_class.from_pretrained(
        family.pretrained_model_name_or_path, subfolder="text_encoder", dtype=torch.float32
    )
    family.encoders["text_encoder"] = whole.eval()
    with torch.no_grad():
        theirs = family.encode_captions(["a red star", "x"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    left_out = {name for name in whole.state_dict() if name.startswith(parts)}
    assert whole.state_dict().keys() - reduced.state_dict().keys() == left_out
    assert left_out


def test_a_head_that_shares_the_embedding(request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(FOLDERS[QwenImage])
    kind = QwenImage.encoder_classes["text_encoder"]
    config = kind.config_class.from_pretrained(folder, subfolder="text_encoder")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = kind.from_pretrained(folder, subfolder="text_encoder", config=config)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not list(model.lm_head.parameters())
