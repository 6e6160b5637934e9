"""Names and texts that come from data, as they are shown in messages."""

from __future__ import annotations

MAX_CHARACTERS = 300
"""Length to which a name is shortened: a path of usual length is kept."""

_END = 40


def visible(text: object, most: int = MAX_CHARACTERS) -> str:
    r"""A name or text from data as one line of printable characters, for messages and logs.

    Control characters, line ends, marks that turn the direction of writing and bytes that are not UTF-8 become escapes such as
    ``\x1b``, so that no name can move the cursor, forge a line of a log or hide its end.

    Args:
        text: The name or text.
        most: Maximum number of characters; the middle of a longer text is replaced by ``…``. Defaults to 300.
    """
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[: most - _END - 1]}…{shown[-_END:]}"
    return shown if shown.isprintable() else "".join(map(_escape, shown))


def visible_lines(text: object) -> str:
    """A message of several lines in which nothing but its line ends controls the terminal."""
    return "\n".join("".join(map(_escape, line)) for line in str(text).split("\n"))


def _escape(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode()
