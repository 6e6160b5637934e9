"""Prompts and captions of more tokens than text encoders read."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lit_lora.unknown_tokens import tokenizers_of
from lit_lora.visible import visible

_TOKENIZERS = "transformers.tokenization_utils_base"
_SHOWN = 60

_SAID_HERE = ("Token indices sequence length is longer", "The following part of your input was truncated because CLIP")
"""Beginnings of messages of tokenizers and pipelines that the warning stands for."""

_told: set[str] = set()
"""The prompts of which a warning has told."""


def cut_text(kind: str, text: str, given: str, tokenizer: Any, most: int, lost: str, **options: Any) -> str | None:
    """A sentence that says that the end of a text is cut off; None if it is not.

    Args:
        kind: What the text is, such as "prompt".
        text: The text, of which the message shows the beginning.
        given: What the tokenizer is given, which may have a template around the text.
        tokenizer: The tokenizer.
        most: Number of tokens that the text encoder reads.
        lost: What comes of it.
        **options: Options that the tokenizer is given, as far as they change the number of tokens.
    """
    count = len(tokenizer(given, truncation=False, verbose=False, **options).input_ids)
    if count <= most:
        return None
    shown = visible(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
    return f"a {kind} has {count} tokens, and the text encoder reads {most}, so that {lost}: {shown!r}"


@contextmanager
def cut_prompts_told(pipeline: Any, prompts: Sequence[str]) -> Iterator[None]:
    """A context in which a pipeline draws prompts: warns once of each that is cut, in one sentence.

    Pipelines and tokenizers give two long messages each time, also where another text encoder reads the whole prompt.

    Args:
        pipeline: The pipeline.
        prompts: The prompts that it draws.
    """
    parts = tokenizers_of(getattr(pipeline, "components", {}))
    # Processors of images and text, as FLUX.2 has, tell no limit, and cut nothing here.
    if parts and all(hasattr(one, "model_max_length") for one in parts):
        _tell(max(parts, key=lambda one: one.model_max_length), prompts)
    names = {_TOKENIZERS, *(kind.__module__ for kind in type(pipeline).__mro__)}
    loggers = [logging.getLogger(name) for name in names]
    for one in loggers:
        one.addFilter(_is_other)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_SAID_HERE)


def _tell(tokenizer: Any, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if not isinstance(prompt, str) or prompt in _told:
            continue
        cut = cut_text("prompt", prompt, prompt, tokenizer, tokenizer.model_max_length, "its end is not drawn")
        if cut is not None:
            _told.add(prompt)
            warnings.warn(cut, stacklevel=2)
