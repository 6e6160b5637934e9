"""A prompt that a pipeline cuts is told once, in one sentence."""

from __future__ import annotations

import logging
import warnings
from typing import ClassVar

import pytest
from diffusers import StableDiffusionPipeline

from lit_lora import cut_prompts
from lit_lora.cut_prompts import cut_prompts_told
from lit_lora.embedded import base_path

LONG = "a white six on a black square, " * 20


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_prompts, "_told", set())


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(base_path())


def draw(pipeline: StableDiffusionPipeline, *prompts: str) -> None:
    with cut_prompts_told(pipeline, prompts):
        pipeline.encode_prompt(list(prompts), "cpu", 1, False)


def test_a_cut_prompt_is_told_once_and_pipelines_say_nothing(
    pipeline: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    message = "a prompt has .* tokens, and the text encoder reads 32, so that its end is not drawn"
    with pytest.warns(UserWarning, match=message) as found:
        draw(pipeline, "a six", LONG, LONG)
    messages = [str(one.message) for one in found]
    assert len(messages) == 1
    assert repr(LONG[:60] + "…") in messages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipeline, LONG)
    assert caplog.text == ""


def test_other_messages_of_pipelines_are_still_shown(
    pipeline: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(StableDiffusionPipeline.__module__)
    with cut_prompts_told(pipeline, []):
        logger.warning("something else")
        logger.warning("The following part of your input was truncated because CLIP can only handle 32 tokens")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert cut_prompts._is_other not in logger.filters


def test_the_longest_text_encoder_counts(pipeline: StableDiffusionPipeline) -> None:
    class Longer:
        model_max_length = 10_000

        def __call__(self, text: str, **options: object) -> object:
            return pipeline.tokenizer(text, **options)

    class Both:
        components: ClassVar = {"tokenizer": pipeline.tokenizer, "tokenizer_2": Longer(), "vae": None}

    with warnings.catch_warnings(), cut_prompts_told(Both(), [LONG]):
        warnings.simplefilter("error")
