"""Counts the captions that hold new tokens."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_lora.distributed.collectives import gather
from lit_lora.unknown_tokens import similar_token, unknown_tokens
from lit_lora.visible import visible


class TokenUses:
    """How many of the captions that are trained on hold each new token: one that no caption holds gets no gradient."""

    def __init__(self) -> None:
        self._captions = 0
        self._uses: Counter[str] = Counter()
        self._told = False
        self._misspelt: set[str] = set()
        """Words like a new token of which a warning has told."""

    def count(self, tokenizer: Any, captions: Sequence[str], ids: Tensor, tokens: Iterable[str]) -> None:
        """Count captions, and warn of words in them that are probably misspelt new tokens, once for each word.

        Args:
            tokenizer: Tokenizer with the new tokens.
            captions: ``B`` captions.
            ids: Token ids of captions as the text encoder gets them, int64 ``(B, n)`` on the CPU.
            tokens: The new tokens.
        """
        tokens = list(tokens)
        for caption in captions:
            for word in unknown_tokens(caption, [tokenizer]):
                if word not in self._misspelt and (meant := similar_token(word, tokens)) is not None:
                    self._misspelt.add(word)
                    warnings.warn(
                        f"the caption {visible(caption, 80)!r} has {word}, which is trained on as plain text; the new token is "
                        f"{meant}: correct it in this caption and in others that have it",
                        stacklevel=2,
                    )
        self._captions += len(ids)
        for token in tokens:
            self._uses[token] += int((ids == tokenizer.convert_tokens_to_ids(token)).any(1).sum())

    def warn_unused(self, tokens: Iterable[str]) -> None:
        """Warn once of new tokens that no caption has held, in all processes together.

        A collective call where there are new tokens.

        Args:
            tokens: The new tokens.
        """
        tokens = list(tokens)
        if not tokens or self._told:
            return
        self._told = True
        captions, uses = 0, Counter(dict.fromkeys(tokens, 0))
        for number, counts in gather((self._captions, self._uses)):
            captions += number
            uses.update(counts)
        unused = [token for token in tokens if captions and not uses[token]]
        if unused:
            rank_zero_warn(
                f"no caption holds the new tokens {', '.join(unused)}, which nothing trains; of {captions:,} captions "
                f"{', '.join(f'{uses[token]:,} hold {token}' for token in tokens)}. Write them into the captions, before the "
                f"place where long ones are cut off, or leave them out of model.new_tokens"
            )
