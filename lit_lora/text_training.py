"""What is trained in the text encoders beside the denoiser's adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from lit_lora.errors import UserError, check_least, check_texts
from lit_lora.families import ModelFamily
from lit_lora.families.new_tokens import TokenStart, check_placeholders
from lit_lora.formats.embedding_file import ENDINGS
from lit_lora.formats.from_file import FromFile
from lit_lora.formats.textual_inversion import embeddings_in


class TextTraining:
    """Adapters and new tokens of a family's text encoders.

    Args:
        family: Family whose text encoders are trained.
        adapter: Adapter of the denoiser; a :class:`FromFile` may bring adapters of text encoders and new tokens along. None for
            none.
        text_adapter: Config from which each of the family's adaptable text encoders gets an adapter of its own; None for none.
        new_tokens: New tokens, each with the words whose embeddings it begins with, with its number of random vectors, or with
            the file of an embedding.

    Raises:
        UserError: If the family's text encoders cannot be trained, two arguments bring the same, or nothing is trained at all.
    """

    def __init__(
        self,
        family: ModelFamily,
        adapter: PeftConfig | None,
        text_adapter: PeftConfig | None = None,
        new_tokens: Mapping[str, str | int] | None = None,
    ) -> None:
        self.adapters: dict[str, PeftConfig] = {}
        """Configs of the text encoders' adapters, by the encoders' names."""
        self.tokens: dict[str, TokenStart] = {}
        """New tokens with the first values of their embeddings."""
        self._starts: dict[str, Callable[[PeftModel], None]] = {}
        self._causes: dict[str, None] = {}
        if isinstance(adapter, FromFile):
            self._go_on(family, adapter)
        if text_adapter is not None:
            self._begin(family, text_adapter)
        if new_tokens:
            self._add_tokens(family, new_tokens)
        if adapter is None and not self:
            raise UserError(
                "model.adapter is null, so that nothing would be trained; give a PEFT config, model.text_adapter or "
                "model.new_tokens"
            )

    def __bool__(self) -> bool:
        """Whether anything is trained in the text encoders."""
        return bool(self.adapters or self.tokens)

    def add(self, family: ModelFamily, shard: Callable[[nn.Module], None] | None = None) -> None:
        """Put the adapters and the new tokens into the loaded text encoders.

        Args:
            family: Family with loaded text encoders.
            shard: Function that shards a text encoder under a strategy that shards weights; defaults to none.

        Raises:
            UserError: If an adapter does not fit its text encoder, or a new token is a token already.
        """
        for name, config in self.adapters.items():
            try:
                family.add_text_adapter(name, copy.deepcopy(config), self._starts.get(name))
            except UserError as error:
                raise UserError(f"{self._cause} for {name}: {error}") from error
        if self.tokens:
            family.add_new_tokens(self.tokens)
        if shard is not None:
            family.shard_trained_encoders(shard)

    def check_cached(self, cached: Collection[str], where: object = None) -> None:
        """Check that captions are encoded while training.

        Args:
            cached: Kinds of data that batches take from a cache.
            where: What names the cache, for the error.

        Raises:
            UserError: If batches have text embeddings from a cache.
        """
        if self and "text" in cached:
            place = f" ({where})" if where else ""
            raise UserError(
                f"{self._cause} trains text encoders, and the text embeddings of the cache{place} come from the frozen ones: "
                f"make a cache with lit-lora cache --text false, or leave {self._cause} out"
            )

    def check_resumed(self, family: ModelFamily, saved: Mapping[str, int]) -> None:
        """Check that a checkpoint has the same new tokens.

        Args:
            family: Family with the new tokens of this run.
            saved: New tokens of the checkpoint, each with its number of vectors.

        Raises:
            UserError: If they differ.
        """
        if dict(saved) != family.new_tokens:
            raise UserError(
                f"the checkpoint has the new tokens {_listed(saved)}, and this run {_listed(family.new_tokens)}: resume with the "
                f"model.new_tokens that the checkpoint was made with, or start without ckpt_path"
            )

    @property
    def _cause(self) -> str:
        """The options that ask for text encoders to be trained."""
        return " and ".join(self._causes)

    def _go_on(self, family: ModelFamily, adapter: FromFile) -> None:
        self.adapters = adapter.text_configs(type(family))
        self._starts = {name: partial(adapter.start_text, name) for name in self.adapters}
        self.tokens |= adapter.new_tokens(type(family))
        if self:
            self._causes["model.adapter"] = None

    def _begin(self, family: ModelFamily, text_adapter: PeftConfig) -> None:
        if isinstance(text_adapter, FromFile):
            raise UserError(
                "model.text_adapter takes a PEFT config; to go on with saved adapters of text encoders, set model.adapter to "
                "FromFile, which reads them from the same file"
            )
        if self.adapters:
            raise UserError(
                f"the file of model.adapter has adapters of {' and '.join(self.adapters)} already: leave model.text_adapter out, "
                f"or set drop_text_encoders to true to begin with new ones"
            )
        kind = type(family)
        if not kind.adaptable_encoders:
            raise UserError(
                f"model.text_adapter trains text encoders, and {kind.__name__} names none that can be trained: see "
                f"adaptable_encoders of lit_lora.ModelFamily; leave it out"
            )
        self.adapters = {name: copy.deepcopy(text_adapter) for name in kind.adaptable_encoders}
        self._causes["model.text_adapter"] = None

    def _add_tokens(self, family: ModelFamily, new_tokens: Mapping[str, str | int]) -> None:
        check_texts("model.new_tokens", new_tokens)
        if both := sorted(new_tokens.keys() & self.tokens.keys()):
            raise UserError(
                f"model.new_tokens has {both[0]}, which the file of model.adapter has already with trained embeddings; leave it "
                f"out"
            )
        if not family.token_encoders:
            raise UserError(
                f"model.new_tokens: the pipeline of {type(family).__name__} loads no embeddings of new tokens for all its text "
                f"encoders; leave it out"
            )
        for token, start in new_tokens.items():
            if isinstance(start, int):
                check_least(1, **{f"new_tokens[{token!r}]": start})
            if isinstance(start, str) and start.endswith(ENDINGS):
                self.tokens[token] = embeddings_in(Path(start), type(family))
            else:
                self.tokens[token] = start
        check_placeholders(self.tokens)
        self._causes["model.new_tokens"] = None


def _listed(tokens: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in tokens.items()) or "none"
