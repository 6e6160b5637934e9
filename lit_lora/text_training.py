"""What is trained in the text encoders beside the denoiser's adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import partial

from peft import PeftConfig, PeftModel
from torch import nn

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats.from_file import FromFile


class TextTraining:
    """Adapters of a family's text encoders.

    Args:
        family: Family whose text encoders are trained.
        adapter: Adapter of the denoiser; a :class:`FromFile` may bring adapters of text encoders along. None for none.
        text_adapter: Config from which each of the family's adaptable text encoders gets an adapter of its own; None for none.

    Raises:
        UserError: If the family's text encoders cannot be trained, both arguments bring an adapter for them, or nothing is
            trained at all.
    """

    def __init__(self, family: ModelFamily, adapter: PeftConfig | None, text_adapter: PeftConfig | None = None) -> None:
        self.adapters: dict[str, PeftConfig] = {}
        """Configs of the text encoders' adapters, by the encoders' names."""
        self._starts: dict[str, Callable[[PeftModel], None]] = {}
        self._cause = "model.text_adapter"
        kind = type(family)
        if isinstance(adapter, FromFile) and (found := adapter.text_configs(kind)):
            if text_adapter is not None:
                raise UserError(
                    f"model.adapter goes on with {adapter.path}, which has adapters of {' and '.join(found)} already: leave "
                    f"model.text_adapter out, or set drop_text_encoders to true to begin with new ones"
                )
            self.adapters = found
            self._starts = {name: partial(adapter.start_text, name) for name in found}
            self._cause = "model.adapter"
        elif text_adapter is not None:
            if isinstance(text_adapter, FromFile):
                raise UserError(
                    "model.text_adapter takes a PEFT config; to go on with saved adapters of text encoders, set model.adapter to "
                    "FromFile, which reads them from the same file"
                )
            self.adapters = {name: copy.deepcopy(text_adapter) for name in kind.adaptable_encoders}
        if (text_adapter is not None or self.adapters) and not kind.adaptable_encoders:
            raise UserError(
                f"{self._cause} trains text encoders, and {kind.__name__} names none that can be trained: see adaptable_encoders "
                f"of lit_lora.ModelFamily; leave it out"
            )
        if adapter is None and not self:
            raise UserError(
                "model.adapter is null, so that nothing would be trained; give a PEFT config, or model.text_adapter"
            )

    def __bool__(self) -> bool:
        """Whether anything is trained in the text encoders."""
        return bool(self.adapters)

    def add(self, family: ModelFamily, shard: Callable[[nn.Module], None] | None = None) -> None:
        """Put the adapters into the loaded text encoders.

        Args:
            family: Family with loaded text encoders.
            shard: Function that shards a text encoder under a strategy that shards weights; defaults to none.

        Raises:
            UserError: If an adapter does not fit its text encoder.
        """
        for name, config in self.adapters.items():
            try:
                family.add_text_adapter(name, copy.deepcopy(config), self._starts.get(name), shard)
            except UserError as error:
                raise UserError(f"{self._cause} for {name}: {error}") from error

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
                f"{self._cause} trains {' and '.join(self.adapters)}, and the text embeddings of the cache{place} come from "
                f"the frozen text encoders: make a cache with lit-lora cache --text false, or leave {self._cause} out"
            )
