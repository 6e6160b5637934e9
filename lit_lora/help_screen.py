"""Help texts that fit the terminal: no line is wider, and no word is divided but names that are wider by themselves."""

from __future__ import annotations

import re
import textwrap
from argparse import Action
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

_ROLE = re.compile(r":\w+:`(~?)([^`<>]+)`")
"""A reference in reStructuredText, as :class:`~package.module.Name`, of which the tilde shows the name alone."""

_MATH = re.compile(r":math:`([^`]+)`")

_AS_TEXT = str.maketrans({"\\": "", "{": "(", "}": ")"})
"""From LaTeX to what a terminal can show: ``sigma^(-2)``."""

_LINK = re.compile(r"`([^`<>]+) <([^`<>]+)>`_")

_DIRECTIVE = re.compile(r"\.\. (\w+)::")

_CLASSES = re.compile(r"[\w.]+(?:, [\w.]+)*")
"""The list of the classes that an option takes."""

_INTERNAL = re.compile(r"(?:lit_lora|peft)\.[a-z]\w*\.[\w.]+")
"""The path of a class that has no public name."""

_AT = "./_#=,"
"""Characters after which a name or an address is divided that is wider than its column."""

_LITERAL = re.compile(r"Literal\[[^\]]*\]")

_HANGING = " " * 8


class HelpScreen(DefaultHelpFormatter):
    """jsonargparse's formatter, where argparse leaves headings and options wide and divides words at any letter."""

    def start_section(self, heading: str | None) -> None:
        width = self._width - self._current_indent - len(":")
        super().start_section(heading and textwrap.fill(_plain(heading), width))

    def _format_usage(self, *arguments: object, **options: object) -> str:
        usage: str = super()._format_usage(*arguments, **options)
        first, *others = usage.split("\n")
        shorter = first.replace(" [options] ", " ")  # of the command before a subcommand, which has none
        moved = len(first) - len(shorter)
        usage = "\n".join([shorter, *(line.removeprefix(" " * moved) for line in others)])
        if max(map(len, usage.splitlines()), default=0) <= self._width:
            return usage
        # The names of the commands before it leave too little room beside them.
        return "\n".join(_HANGING + line.strip() if line[:1] == " " else line for line in usage.splitlines()) + "\n\n"

    def _format_action_invocation(self, action: Action) -> str:
        shown = super()._format_action_invocation(action)
        if len(shown) <= self._width - self._current_indent:
            return shown
        return f"\n{' ' * self._current_indent}".join(re.split(r"(?<=,) (?=-)", shown))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _lines(text, width)

    def _expand_help(self, action: Action) -> str:
        text, listed, classes = str(super()._expand_help(action)).partition("known subclasses: ")
        text = text.replace("default: )", 'default: "")')
        choices = _literals(getattr(action, "_typehint", None))
        # jsonargparse takes the beginning of mask.png for a module, and leaves it out.
        text = _LITERAL.sub(lambda found: next(choices, found[0]), text)
        return text + listed + _CLASSES.sub(lambda found: ", ".join(_names(found[0])), classes, count=1)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in _lines(text, width - len(indent)))


def _names(classes: str) -> Iterator[str]:
    """The names of classes, which are enough to choose one; of those with the same name the paths."""
    paths = [path for path in classes.split(", ") if not _INTERNAL.fullmatch(path)]
    names = Counter(path.rpartition(".")[2] for path in paths)
    for path in paths:
        name = path.rpartition(".")[2]
        yield name if names[name] == 1 else path


def _literals(hint: Any) -> Iterator[str]:
    """The literals in a type, as Python writes them."""
    if get_origin(hint) is Literal:
        yield f"Literal[{', '.join(map(repr, get_args(hint)))}]"
        return
    for part in get_args(hint):
        yield from _literals(part)


def _lines(text: str, width: int) -> list[str]:
    words = (part for word in _plain(text).split() for part in _parts(word, width))
    return textwrap.wrap(" ".join(words), width, break_long_words=False, break_on_hyphens=False)


def _plain(text: str) -> str:
    """A text without the marks of reStructuredText."""
    text = _MATH.sub(lambda found: found[1].translate(_AS_TEXT), text)
    text = _LINK.sub(r"\1 (\2)", text)
    text = _ROLE.sub(lambda found: found[2].rpartition(".")[2] if found[1] else found[2], text)
    text = _DIRECTIVE.sub(lambda found: f"{found[1].capitalize()}:", text)
    return re.sub(r"::(?=\s|$)", ":", text).replace("`", "")


def _parts(word: str, width: int) -> list[str]:
    """A word, in parts that fit if it is wider."""
    parts = []
    while len(word) > width:
        place = max(word.rfind(one, 0, width) for one in _AT) + 1
        if place == 0:
            break
        parts.append(word[:place])
        word = word[place:]
    return [*parts, word]
