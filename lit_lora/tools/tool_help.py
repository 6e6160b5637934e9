"""Help of the commands that have no config: what an option takes in plain words, and nothing twice."""

from __future__ import annotations

import copy
import re
from argparse import Action
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from lit_lora.help_screen import HelpScreen

_TYPE = re.compile(r" \((?:required, )?type: ")
"""Where jsonargparse tells the type, and whatever comes with it."""


class ToolHelp(HelpScreen):
    """The screen without the spelling that adds to a list, types that the screen shows as choices, and defaults of null."""

    def _format_action_invocation(self, action: Action) -> str:
        action = copy.copy(action)
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
        return super()._format_action_invocation(action)

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        if not (found := list(_TYPE.finditer(text))):  # of --help itself
            return text
        hint = getattr(action, "_typehint", None) or action.type
        told = [] if get_origin(hint) is Literal or hint is bool else [_told(hint)]
        if action.default not in (None, ""):
            told.append(
                f"default: {str(action.default).lower() if isinstance(action.default, bool) else action.default}"
            )
        return text[: found[-1].start()] + (f" ({', '.join(told)})" if told else "")


def _told(hint: Any) -> str:
    words = [get_origin(part) is Literal for part in get_args(hint) if part is not NoneType]
    return f"one of {', '.join(_kinds(hint))}" if words and all(words) else f"type: {' or '.join(_kinds(hint))}"


def _kinds(hint: Any) -> list[str]:
    """Names of the types, or the words, that an option takes."""
    if get_origin(hint) is Literal:
        return [str(word) for word in get_args(hint)]
    if get_origin(hint) is list:
        return [f"list[{' or '.join(_kinds(get_args(hint)[0]))}]"]
    if get_args(hint):
        return [kind for part in get_args(hint) if part is not NoneType for kind in _kinds(part)]
    return [hint.__name__]
