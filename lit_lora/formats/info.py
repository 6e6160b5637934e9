"""What its maker says about an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_lora.argument_types import check_types
from lit_lora.errors import UserError


@dataclass(frozen=True)
class AdapterInfo:
    """What users of an adapter should know, for the metadata of its files and its model card.

    Args:
        title: Name of the adapter; defaults to one made of the base's name and the method.
        trigger_words: Words of the training captions that prompts should contain. Defaults to none.
        description: What the adapter does; defaults to nothing.
        author: Name of the author; defaults to none.
        license: Identifier of the license, such as ``openrail``; defaults to none.
        tags: Keywords; defaults to none.

    Raises:
        UserError: If a trigger word is empty.
    """

    title: str | None = None
    trigger_words: Sequence[str] = ()
    description: str | None = None
    author: str | None = None
    license: str | None = None
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not all(word.strip() for word in self.trigger_words):
            raise UserError(f"trigger_words={self.trigger_words!r} should be a list of words that are not empty")

    @property
    def metadata(self) -> dict[str, str]:
        """The same under the model spec's keys; what is not given is left out."""
        entries = {
            "modelspec.title": self.title,
            "ss_output_name": self.title,
            "modelspec.trigger_phrase": ", ".join(self.trigger_words),
            "modelspec.description": self.description,
            "modelspec.author": self.author,
            "modelspec.license": self.license,
            "modelspec.tags": ", ".join(self.tags),
        }
        return {name: value for name, value in entries.items() if value}
