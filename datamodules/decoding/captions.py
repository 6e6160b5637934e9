"""Sources and random augmentation of captions."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_lora.argument_types import check_types
from lit_lora.datamodules.decoding.decode import BadSampleError, decode_text
from lit_lora.datamodules.decoding.wildcards import drawn_alternatives
from lit_lora.draws import seed_of
from lit_lora.errors import UserError, check_whole
from lit_lora.files import check_regular
from lit_lora.unique_keys import load_json

MAX_TEXT_BYTES = 1 << 20
"""Maximum size of a ``.txt`` or ``.cls`` member; a larger one is refused before it is decoded."""

MAX_JSON_BYTES = 16 << 20
"""Maximum size of a ``.json`` member, in which a caption may be one entry of many."""

_MAX_NAMES_BYTES = 64 << 20
_EXTENSIONS = ("txt", "json", "cls")

_LINES: dict[int, list[str]] = {}
"""Class names from files, by the id of their source; jsonargparse would take an attribute of the source for an option."""


@dataclass(frozen=True)
class CaptionSource:
    """A source of captions: the member of a sample, and the location within it, that may hold a caption.

    Args:
        extension: Extension of the member: ``txt`` (default) holds the text itself, ``json`` holds it under ``key``, ``cls``
            holds a class, as in image classification data sets.
        key: Path of the caption in a ``json`` member: keys and list indices separated by dots, as in ``captions.en.0``. If it
            leads to a list of texts, one of them is drawn for each occurrence of the sample. Defaults to ``caption``.
        template: Caption in which the text or class replaces ``{}``, as in ``a photo of a {}``. Defaults to ``{}``.
        class_names: Names of the classes, for ``cls`` members that hold a number, counted from 0: a list, or a text file with
            one name per line. Defaults to null: the member holds the name itself.
        weight: Relative probability of drawing this source among several. Defaults to null: the first source that a sample has
            is used.

    Raises:
        UserError: If a value is out of its bounds, or the file of class names cannot be read.
    """

    extension: Literal["txt", "json", "cls"] = "txt"
    key: str = "caption"
    template: str = "{}"
    class_names: str | list[str] | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not all(self.key.split(".")):
            raise UserError(f"key={self.key!r} has an empty part; separate names by single dots, as in captions.en")
        if self.template.count("{}") != 1:
            raise UserError(
                f"template={self.template!r} contains {{}} {self.template.count('{}')} times; write it once,"
                " as in 'a photo of a {}'"
            )
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UserError(f"weight={self.weight} must be finite and above 0; remove the source if it is not wanted")
        if self.class_names is not None and self.extension != "cls":
            raise UserError(
                f"class_names needs extension: cls, not {self.extension}; change the extension or remove class_names"
            )
        names = self._names
        if names is not None and not names:
            raise UserError(f"class_names={self.class_names!r} contains no names; write one for each class")
        if names is not None and "" in names:
            raise UserError(f"class_names: the name of class {names.index('')} is empty; each class needs one")

    def texts(self, members: Mapping[str, bytes]) -> list[str]:
        """The captions that this source finds in a sample, before the template is applied; an empty list if there are none.

        Args:
            members: The sample's members by extension.

        Raises:
            BadSampleError: If the member exists but cannot be read.
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
        """The options that determine the captions, as JSON values; class names as a digest."""
        values = asdict(self)
        if self._names is not None:
            values["class_names"] = self._names_digest
        return values

    def warn_of_change(self) -> None:
        """Warn if the file with the names was changed after the source was made, which keeps the names of then."""
        from lightning.pytorch.utilities import rank_zero_warn

        if isinstance(self.class_names, str):
            with suppress(UserError):  # a file that is gone is no longer needed
                if _read_lines(self.class_names) != self._names:
                    rank_zero_warn(
                        f"class_names: {self.class_names} was changed after it was read, and the names of then are used; make a "
                        "new datamodule for the new ones"
                    )

    def described_contents(self) -> dict[str, str]:
        """What a resumed run compares beside the options: the names in the file."""
        return {"names": self._names_digest} if isinstance(self.class_names, str) else {}

    @property
    def place(self) -> str:
        """Location of the caption, for messages."""
        return f"under the key {self.key!r} in .json" if self.extension == "json" else f"in .{self.extension}"

    @property
    def _names_digest(self) -> str:
        return hashlib.blake2b("\n".join(self._names or ()).encode(), digest_size=16).hexdigest()

    @property
    def _names(self) -> list[str] | None:
        if not isinstance(self.class_names, str):
            return self.class_names
        if id(self) not in _LINES:  # read when the source is made, whatever becomes of the file
            _LINES[id(self)] = _read_lines(self.class_names)
            weakref.finalize(self, _LINES.pop, id(self))
        return _LINES[id(self)]


def _default_sources() -> list[CaptionSource]:
    return [CaptionSource("txt"), CaptionSource("json")]


@dataclass(frozen=True)
class Captions:
    """Sources of captions, and their augmentation at each occurrence of a sample.

    Each random choice is a function of the seed and of the number of the sample's occurrence, so captions vary between the
    occurrences of a sample and are the same after a resume.

    Args:
        sources: Sources of captions. Without weights, the first source that a sample has is used; with weights, one of its
            sources is drawn at each occurrence. Defaults to ``txt``, then ``json`` under the key ``caption``.
        dropout: Probability of an empty caption, for classifier-free guidance. Defaults to 0.
        shuffle_tags: Whether to shuffle the tags of a caption at each occurrence. Defaults to false.
        keep_tags: Number of tags at the front that are not shuffled. Defaults to 0.
        separator: Text between two tags. Defaults to ``", "``.
        prefix: Text before each caption that is not dropped. Defaults to nothing. Before an empty caption, a separator at its
            end is left out.
        suffix: Text after each caption that is not dropped. Defaults to nothing.
        wildcards: Whether one of the alternatives in braces is drawn at each occurrence, as in ``a {red|blue} hat``, in captions,
            templates, prefix and suffix. Alternatives may be empty, and may hold braces themselves; braces without ``|`` stay as
            they are. Defaults to false: all braces are text.

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
    wildcards: bool = False

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not self.sources:
            raise UserError("sources is empty; add at least one source of captions, as {extension: txt}")
        weighted = sum(source.weight is not None for source in self.sources)
        if weighted not in (0, len(self.sources)):
            raise UserError(
                f"{weighted} of {len(self.sources)} caption sources have a weight; give one to all or to none"
            )
        if not 0 <= self.dropout <= 1:
            raise UserError(f"dropout={self.dropout} is not a probability; it must be in [0, 1]")
        check_whole(0, keep_tags=self.keep_tags)
        if self.keep_tags and not self.shuffle_tags:
            warnings.warn(
                f"keep_tags={self.keep_tags} has no effect without shuffle_tags: true; set it, or leave keep_tags out",
                stacklevel=3,
            )
        if not self.separator:
            raise UserError("separator is empty; write the text between two tags, as ', '")

    @classmethod
    def anywhere(cls, key: str) -> Captions:
        """Captions from the first of all members that has one, for packing and checking.

        Args:
            key: Path of captions in ``json`` members.
        """
        return cls([CaptionSource("txt"), CaptionSource("json", key), CaptionSource("cls")])

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of the members that may hold a caption, in the order of the sources, without repeats."""
        return tuple(dict.fromkeys(source.extension for source in self.sources))

    @property
    def fixed(self) -> bool:
        """Whether captions are the same at each occurrence, so that :meth:`draw_fixed` needs no slot."""
        return not (self.dropout or self.shuffle_tags or self.wildcards or self._drawn_by_weight)

    def draw(self, members: Mapping[str, bytes], seed: int, slot: int) -> str:
        """The caption of a sample at one occurrence.

        Args:
            members: The sample's members by extension; members that are not in :attr:`extensions` are ignored.
            seed: Seed of the run.
            slot: Number of this occurrence in the whole run.

        Raises:
            BadSampleError: If the sample has no caption, or one that cannot be read or whose wildcards are nested too deeply.
        """
        found = self._found(members)
        source, texts = self._draw_source(list(found), seed, slot) if self._drawn_by_weight else next(found)
        text = texts[0] if len(texts) == 1 else texts[_generator(seed, "caption", slot).integers(len(texts))]
        choices = _generator(seed, "wildcards", slot) if self.wildcards else None
        if choices is not None:  # before tags are shuffled, since alternatives may hold separators
            text = drawn_alternatives(text, choices)
        if self.shuffle_tags:
            text = self._shuffle(text, seed, slot)
        # Drawn last, so that a sample without a usable caption is found even if its caption is dropped.
        if self.dropout and _generator(seed, "caption dropout", slot).random() < self.dropout:
            return ""
        caption = self._finish(source, text)
        return caption if choices is None else drawn_alternatives(caption, choices)

    def draw_fixed(self, members: Mapping[str, bytes]) -> str:
        """The only caption of a sample, if captions are :attr:`fixed`.

        Raises:
            BadSampleError: As for :meth:`draw`, and if there are several captions to draw from.
        """
        assert self.fixed, "captions that vary need a slot"
        source, texts = next(self._found(members))
        if len(texts) > 1:
            raise BadSampleError(f"there are {len(texts)} captions {source.place}; select one, as {source.key}.0")
        return self._finish(source, texts[0])

    def description(self) -> dict[str, Any]:
        """The options that determine the captions, as JSON values; equal for class names of equal content."""
        values = asdict(self) | {"sources": [source.description() for source in self.sources]}
        if not self.wildcards:  # as in the descriptions of caches that were made before there were any
            del values["wildcards"]
        return values

    @property
    def _drawn_by_weight(self) -> bool:
        return len(self.sources) > 1 and self.sources[0].weight is not None

    def _found(self, members: Mapping[str, bytes]) -> Iterator[tuple[CaptionSource, list[str]]]:
        """Yield each source that the sample has, with its texts; there is at least one."""
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
        caption = source.template.replace("{}", text)
        # Of an image that has the prefix alone, no separator stays at its end.
        return (self.prefix if caption else self.prefix.removesuffix(self.separator)) + caption + self.suffix


def warn_of_changed_names(decoders: Iterable[object]) -> None:
    """Warn of files with class names that were changed after the decoders' sources of captions were made."""
    captions = {id(found): found for one in decoders if isinstance(found := getattr(one, "captions", None), Captions)}
    for source in (source for found in captions.values() for source in found.sources):
        source.warn_of_change()


def _generator(seed: int, name: str, slot: int) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, name, slot))


def _texts_under(key: str, data: bytes) -> list[str]:
    """The texts at a dotted path of a JSON document; an empty list if the path does not lead to a text."""
    try:
        value: Any = load_json(data)
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
    if isinstance(value, list) and part.isascii() and part.isdigit() and len(part) < 18 and int(part) < len(value):
        return value[int(part)]
    return None


def _whole(text: str) -> str:
    # JSON can encode half of a surrogate pair, at which tokenizers would fail much later.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(f"the caption in .json is not Unicode (character {error.start})") from error
    return text


def _class_name(text: str, names: Sequence[str]) -> str:
    if not (text.isascii() and text.isdigit()):
        raise BadSampleError(f"the class {text[:20]!r} is not a number, which class_names requires")
    if len(text) > 18 or int(text) >= len(names):  # Python refuses to read thousands of digits
        raise BadSampleError(f"the class {text[:20]} is out of range; class_names has {len(names)} names")
    return names[int(text)]


def _read_lines(path: str) -> list[str]:
    try:
        file = Path(path).expanduser()
        size = check_regular(file).st_size
        if size > _MAX_NAMES_BYTES:
            raise UserError(f"class_names: {path} has {size} bytes, more than {_MAX_NAMES_BYTES}; name the right file")
        with file.open(encoding="utf-8-sig") as lines:
            return [line.strip() for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"class_names: cannot read {path} ({reason}); name a file with one name per line") from error
