"""Sources of captions, and their random variation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_lora.datamodules.decoding.decode import BadSampleError, decode_text
from lit_lora.draws import seed_of
from lit_lora.errors import UserError, check_least

MAX_TEXT_BYTES = 1 << 20
"""A larger ``.txt`` or ``.cls`` member is no caption; it is refused before it is decoded."""

MAX_JSON_BYTES = 16 << 20
"""The same for ``.json`` members, in which a caption may be one entry of many."""

_EXTENSIONS = ("txt", "json", "cls")


@dataclass(frozen=True)
class CaptionSource:
    """A place in a sample where a caption may be.

    Args:
        extension: The member that holds it: ``txt`` is the text itself, ``json`` has it under ``key``, ``cls`` is a class,
            as image classification sets have it.
        key: Where the caption is in a ``json`` member: names of keys and numbers of list entries with dots between
            them, as in ``captions.en.0``. A list of texts there is several captions, of which each showing draws one.
        template: Caption in which the text or class replaces ``{}``, as in ``a photo of a {}``. The default is ``{}``.
        class_names: The names of the classes, for ``cls`` members that hold a number, counted from 0: a text file with
            one name in each line, or a list. Without it the member holds the name itself.
        weight: With several sources, how often this one is drawn in proportion to the others.

    Raises:
        UserError: If a value is out of its bounds, or the file of class names cannot be read.
    """

    extension: Literal["txt", "json", "cls"] = "txt"
    key: str = "caption"
    template: str = "{}"
    class_names: str | list[str] | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.extension not in _EXTENSIONS:
            raise UserError(f"extension={self.extension!r} holds no captions; choose one of {', '.join(_EXTENSIONS)}")
        if not all(self.key.split(".")):
            raise UserError(f"key={self.key!r} has an empty part; write names with single dots between, as captions.en")
        if self.template.count("{}") != 1:
            raise UserError(
                f"template={self.template!r} has {self.template.count('{}')} places for the text; write {{}} once,"
                " as in 'a photo of a {}'"
            )
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UserError(f"weight={self.weight} is no finite number above 0; leave out a source that is not wanted")
        if self.class_names is not None and self.extension != "cls":
            raise UserError(f"class_names belongs to extension cls, not {self.extension}; drop one of them")
        names = self._names
        if names is not None and not names:
            raise UserError(f"class_names={self.class_names!r} holds no names; write one for each class")
        if names is not None and "" in names:
            raise UserError(f"class_names: the name of class {names.index('')} is empty; each class needs one")

    def texts(self, members: Mapping[str, bytes]) -> list[str]:
        """The captions that a sample has here, before the template; none where there is nothing.

        Args:
            members: The sample's members by extension.

        Raises:
            BadSampleError: If the member is there but cannot be read.
        """
        if self.extension not in members:
            return []
        data = members[self.extension]
        limit = MAX_JSON_BYTES if self.extension == "json" else MAX_TEXT_BYTES
        if len(data) > limit:
            raise BadSampleError(f"the .{self.extension} member has {len(data)} bytes, more than {limit}")
        if self.extension == "json":
            return _texts_under(self.key, data)
        text = decode_text(data)
        return [text if self._names is None else _class_name(text, self._names)]

    def description(self) -> dict[str, Any]:
        """Plain JSON values that identify what captions come out; class names as a digest."""
        values = asdict(self)
        if self._names is not None:
            values["class_names"] = hashlib.blake2b("\n".join(self._names).encode(), digest_size=16).hexdigest()
        return values

    @property
    def place(self) -> str:
        """A phrase for the place, for messages."""
        return f"under the key {self.key!r} in .json" if self.extension == "json" else f"in .{self.extension}"

    @property
    def _names(self) -> list[str] | None:
        return _read_lines(self.class_names) if isinstance(self.class_names, str) else self.class_names


def _default_sources() -> list[CaptionSource]:
    return [CaptionSource("txt"), CaptionSource("json")]


@dataclass(frozen=True)
class Captions:
    """Where captions are, and how they vary from one showing of a sample to the next.

    Each random choice is a function of the seed and the slot, so a sample has other captions at other showings, and the
    same after a resume.

    Args:
        sources: Where captions are. Without weights, the first that a sample has; with weights, one of those it has is
            drawn at each showing.
        dropout: Probability of an empty caption, for classifier-free guidance. The default is 0.
        shuffle_tags: Shuffle the tags of a caption at each showing. The default is false.
        keep_tags: Number of tags at the front that stay in place, by default 0.
        separator: Text between two tags, by default ``", "``.
        prefix: Text before each caption that is not dropped; empty by default.
        suffix: Text after each caption that is not dropped; empty by default.

    Raises:
        UserError: If a value is out of its bounds, or some sources have weights and others have none.
    """

    sources: list[CaptionSource] = field(default_factory=_default_sources)
    dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0
    separator: str = ", "
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources is empty; name at least one place for captions, as {extension: txt}")
        weighted = sum(source.weight is not None for source in self.sources)
        if weighted not in (0, len(self.sources)):
            raise UserError(
                f"{weighted} of {len(self.sources)} caption sources have a weight; give one to all or to none"
            )
        if not 0 <= self.dropout <= 1:
            raise UserError(f"dropout={self.dropout} is no probability; it must be from 0 to 1")
        check_least(0, keep_tags=self.keep_tags)
        if not self.separator:
            raise UserError("separator is empty; write what stands between two tags, as ', '")

    @classmethod
    def anywhere(cls, key: str) -> Captions:
        """Captions from the first member that has one, for packing and checking.

        Args:
            key: Where captions are in ``json`` members.
        """
        return cls([CaptionSource("txt"), CaptionSource("json", key), CaptionSource("cls")])

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members that may hold a caption, each once, in the order of the sources."""
        return tuple(dict.fromkeys(source.extension for source in self.sources))

    @property
    def fixed(self) -> bool:
        """Whether captions are the same at each showing, so that :meth:`draw_fixed` needs no slot."""
        return not self.dropout and not self.shuffle_tags and not self._drawn_by_weight

    def draw(self, members: Mapping[str, bytes], seed: int, slot: int) -> str:
        """The caption of a sample at one showing.

        Args:
            members: The sample's members by extension; those that are not in :attr:`extensions` are not looked at.
            seed: The run's seed.
            slot: The number of this showing in the whole run.

        Raises:
            BadSampleError: If the sample has no caption, or one that cannot be read.
        """
        found = self._found(members)
        source, texts = self._draw_source(list(found), seed, slot) if self._drawn_by_weight else next(found)
        text = texts[0] if len(texts) == 1 else texts[_generator(seed, "caption", slot).integers(len(texts))]
        if self.shuffle_tags:
            text = self._shuffle(text, seed, slot)
        # Last, so that a sample without a usable caption is found whether or not the caption is dropped.
        if self.dropout and _generator(seed, "caption dropout", slot).random() < self.dropout:
            return ""
        return self._finish(source, text)

    def draw_fixed(self, members: Mapping[str, bytes]) -> str:
        """The one caption of a sample, where the captions are :attr:`fixed`.

        Raises:
            BadSampleError: As for :meth:`draw`, and if there are several captions to draw from.
        """
        assert self.fixed, "these captions differ from showing to showing"
        source, texts = next(self._found(members))
        if len(texts) > 1:
            raise BadSampleError(f"there are {len(texts)} captions {source.place}; name one, as {source.key}.0")
        return self._finish(source, texts[0])

    def description(self) -> dict[str, Any]:
        """Plain JSON values that identify what captions come out; equal for class names of equal content."""
        return asdict(self) | {"sources": [source.description() for source in self.sources]}

    @property
    def _drawn_by_weight(self) -> bool:
        return len(self.sources) > 1 and self.sources[0].weight is not None

    def _found(self, members: Mapping[str, bytes]) -> Iterator[tuple[CaptionSource, list[str]]]:
        """The sources that the sample has, at least one, with their texts; read lazily."""
        none = True
        for source in self.sources:
            if texts := source.texts(members):
                none = False
                yield source, texts
        if none:
            raise BadSampleError(f"there is no text {' or '.join(source.place for source in self.sources)}")

    def _draw_source(
        self, found: Sequence[tuple[CaptionSource, list[str]]], seed: int, slot: int
    ) -> tuple[CaptionSource, list[str]]:
        weights = np.array([source.weight for source, _ in found], np.float64)
        return found[_generator(seed, "caption source", slot).choice(len(found), p=weights / weights.sum())]

    def _shuffle(self, text: str, seed: int, slot: int) -> str:
        tags = text.split(self.separator)
        kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
        order = _generator(seed, "tags", slot).permutation(len(others))
        return self.separator.join(kept + [others[place] for place in order])

    def _finish(self, source: CaptionSource, text: str) -> str:
        return self.prefix + source.template.replace("{}", text) + self.suffix


def _generator(seed: int, name: str, slot: int) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, name, slot))


def _texts_under(key: str, data: bytes) -> list[str]:
    """The texts at a dotted path of a JSON document; none where the path leads to no text."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"the .json member is not valid ({error})") from error
    for part in key.split("."):
        value = _entry(value, part)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return []
    return [_whole(text).strip() for text in texts]


def _entry(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    if isinstance(value, list) and part.isascii() and part.isdigit() and int(part) < len(value):
        return value[int(part)]
    return None


def _whole(text: str) -> str:
    # JSON can spell half a character, at which tokenizers fail much later.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(f"the caption in .json is not Unicode (character {error.start})") from error
    return text


def _class_name(text: str, names: Sequence[str]) -> str:
    if not (text.isascii() and text.isdigit()):
        raise BadSampleError(f"the class {text[:20]!r} is not a number, as class_names needs it")
    if len(text) > 18 or int(text) >= len(names):  # Python refuses to read thousands of digits
        raise BadSampleError(f"the class {text[:20]} is out of range; class_names has {len(names)} names")
    return names[int(text)]


@lru_cache  # the dataclass cannot keep them: what it has besides its fields, jsonargparse takes for options
def _read_lines(path: str) -> list[str]:
    try:
        with Path(path).expanduser().open(encoding="utf-8-sig") as file:
            return [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"class_names: cannot read {path} ({reason}); name a file with one name in each line"
        ) from error
