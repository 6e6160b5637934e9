"""Arguments of ``lit-lora adapter`` in the form that jsonargparse reads."""

from __future__ import annotations

import json
import re

_FLAGS = ("--denoiser_only", "--dry_run", "--json", "--layers", "--overwrite", "--private")
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def adapter_arguments(arguments: list[str]) -> list[str]:
    """The arguments with values for flags, and with lists where a command takes several values.

    ``--overwrite`` becomes ``--overwrite=true``; in ``merge ONE TWO OUTPUT --weights 0.7 0.3`` the adapters become one list and
    the weights another.

    Args:
        arguments: Subcommand and its arguments.
    """
    made: list[str] = []
    for i, argument in enumerate(arguments):
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        made.append(f"{argument}=true" if argument in _FLAGS and following not in ("true", "false") else argument)
    return made if made[:1] != ["merge"] else ["merge", *_merged(made[1:])]


def _merged(arguments: list[str]) -> list[str]:
    first_option = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    places, options = arguments[:first_option], arguments[first_option:]
    made = [json.dumps(places[:-1]), places[-1]] if len(places) > 1 and not places[0].startswith("[") else places
    while options:
        made.append(options.pop(0))
        if made[-1] == "--weights":
            count = next((i for i, value in enumerate(options) if not _NUMBER.fullmatch(value)), len(options))
            if count:
                made.append(f"[{', '.join(options[:count])}]")
                del options[:count]
    return made
