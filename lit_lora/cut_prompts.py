"""Prompts of more tokens than a pipeline's text encoders read."""

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
    most = tokenizer.model_max_length
    for prompt in prompts:
        if not isinstance(prompt, str) or prompt in _told:
            continue
        count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if count > most:
            _told.add(prompt)
            shown = visible(prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}…")
            warnings.warn(
                f"a prompt has {count} tokens, and the text encoder reads {most}, so that its end is not drawn: {shown!r}",
                stacklevel=2,
            )
