"""A misspelt new token is no token: prompts and captions that hold one are told."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import CLIPTokenizer

from lit_lora.families import StableDiffusion
from lit_lora.families.new_tokens import add_tokens
from lit_lora.module import LoraDiffusion
from lit_lora.unknown_tokens import unknown_tokens, warn_of_unknown_tokens
from tests.helpers import loader_of, make_batches


def with_tokens(tokenizer: CLIPTokenizer, base: Path, tokens: dict[str, int]) -> Any:
    family = StableDiffusion(str(base))
    family.load(torch.float32, without=("vae", "denoiser"))
    own = copy.deepcopy(tokenizer)
    add_tokens(own, family.encoders["text_encoder"], tokens)
    return own


def test_words_that_are_no_token(tokenizer: CLIPTokenizer, sd_folder: Path) -> None:
    own = with_tokens(tokenizer, sd_folder, {"<my-cat>": 1, "<style>": 2})
    text = "a <my-cat> or <My-Cat>, <mycat> and <mycat> in <style>, 3 < 4 > 2, <lora:x:1> <>"
    assert unknown_tokens(text, [own]) == ["<mycat>"]
    assert unknown_tokens(text, [tokenizer, own]) == ["<mycat>"]
    assert unknown_tokens("a cat", []) == []


def test_each_prompt_is_told_once_with_the_tokens_that_there_are(tokenizer: CLIPTokenizer, sd_folder: Path) -> None:
    parts = {"tokenizer": with_tokens(tokenizer, sd_folder, {"<my-cat>": 1, "<style>": 2}), "tokenizer_2": None}
    prompts = ["a <mycat>", "a <my-cat>", "<mycat>"]
    with pytest.warns(UserWarning, match="drawn as plain text") as told:
        warn_of_unknown_tokens(prompts, parts)
    warn_of_unknown_tokens(prompts, parts)  # a second warning would be an error
    assert [str(one.message).split(" has ")[0] for one in told] == ["the prompt 'a <mycat>'", "the prompt '<mycat>'"]
    assert "<mycat>, which is drawn as plain text: the new tokens are <my-cat>, <style>" in str(told[0].message)
    with pytest.warns(UserWarning, match="drawn as plain text: neither the base nor an adapter has new tokens"):
        warn_of_unknown_tokens(["a <mycat>"], {"tokenizer": copy.deepcopy(tokenizer)})
    warn_of_unknown_tokens(["a <mycat>"], {"unet": None})


def test_prompts_and_negative_prompts_are_looked_at_where_images_are_drawn(sd_folder: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32)
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 2.0, "negative_prompts": ["<bad>"]}
    with pytest.warns(UserWarning, match="drawn as plain text") as told:
        family.generate(["a <cat>"], [0], **options)
    assert [str(one.message).split(" has ")[0] for one in told] == ["the prompt 'a <cat>'", "the prompt '<bad>'"]


@pytest.mark.parametrize(
    ("captions", "told"),
    [
        (
            ["a <mycat> on white", "a <my-cat>"],
            "'a <mycat> on white' has <mycat>, .* as plain text; the new token is <my-cat>",
        ),
        (["a <my-cat> on <br> <i>white</i>", "a cat"], None),
    ],
)
def test_captions_with_a_misspelt_token(
    captions: list[str], told: str | None, sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    module = LoraDiffusion(StableDiffusion(str(sd_folder)), None, base_dtype="float32", new_tokens={"<my-cat>": 1})
    batches = [{**batch, "caption": captions} for batch in make_batches(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(**trainer_options | {"max_steps": 2}).fit(module, loader_of(batches))
    found = [str(one.message) for one in caught if "plain text" in str(one.message)]
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0])
