"""Words in the shape of a new token, such as ``<cat-toy>``, that no tokenizer knows and that are taken as plain text."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any
from weakref import WeakKeyDictionary

from lit_lora.visible import visible

_PLACEHOLDER = re.compile(r"<[\w.-]+>")
_SHOWN = 3

_told: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""Prompts of which a warning has told, by the first tokenizer that has read them."""


def tokenizers_of(parts: Mapping[str, Any]) -> list[Any]:
    """The tokenizers among the parts of a pipeline."""
    return [part for name, part in parts.items() if name.startswith("tokenizer") and part is not None]


def unknown_tokens(text: str, tokenizers: Iterable[Any]) -> list[str]:
    """The words between ``<`` and ``>`` in a text that are no token of any tokenizer."""
    words = dict.fromkeys(_PLACEHOLDER.findall(text))
    return [word for word in words if not any(len(one.tokenize(word)) == 1 for one in tokenizers)]


def warn_of_unknown_tokens(prompts: Iterable[str], parts: Mapping[str, Any]) -> None:
    """Warn, once for each prompt, of words in the shape of new tokens that are drawn as plain text.

    Args:
        prompts: Prompts and negative prompts.
        parts: Parts of a pipeline, of which the tokenizers are asked.
    """
    tokenizers = tokenizers_of(parts)
    if not tokenizers:
        return
    told = _told.setdefault(tokenizers[0], set())
    for prompt in prompts:
        unknown = [] if prompt in told else unknown_tokens(prompt, tokenizers)
        if unknown:
            told.add(prompt)
            warnings.warn(
                f"the prompt {visible(prompt, 80)!r} has {', '.join(unknown)}, which is drawn as plain text: "
                f"{_described(unknown[0], _new_tokens(tokenizers))}",
                stacklevel=3,
            )


def similar_token(word: str, tokens: Sequence[str]) -> str | None:
    """The new token that a word is probably meant to be; None if it is like none."""
    return next(iter(get_close_matches(word, tokens, n=1, cutoff=0.7)), None)


def _described(word: str, tokens: Sequence[str]) -> str:
    if not tokens:
        return "neither the base nor an adapter has new tokens"
    nearest = get_close_matches(word, tokens, n=_SHOWN, cutoff=0.0)
    more = f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else ""
    return f"the new tokens are {', '.join(nearest)}{more}"


def _new_tokens(tokenizers: Iterable[Any]) -> list[str]:
    """Tokens that were added to tokenizers, without those that only follow others: ``<style>_1`` of ``<style>``."""
    added = {token for one in tokenizers for token in one.get_added_vocab() if token not in one.all_special_tokens}
    return sorted(token for token in added if re.sub(r"_\d+$", "", token) not in added - {token})
