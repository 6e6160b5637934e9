"""The commands beside training, one file each."""

from __future__ import annotations

import re
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from lit_lora.console import print_error
from lit_lora.errors import UserError
from lit_lora.option_names import in_full, no_option, option_names
from lit_lora.tools.tool_help import ToolHelp

_NO_LIST = re.compile(r"""Parser key "([^"]+)":\s+Expected a <class 'list'>\. Got value: (.*)""")
"""What jsonargparse says of a list of positional arguments whose last one is missing."""

_MISSING = re.compile(r"Option '((?:\w+\.)*)(\w+)' is required")
"""What jsonargparse says of an argument that is not given."""

_NO_CONFIG = re.compile(r"""Parser key "config":\s+(?:File does not exist|Path is not a file): '(.*)'""")
"""What jsonargparse says of a config that is no file."""

_ABSENT = re.compile(r"Unrecognized arguments: --([\w.-]+)")

_OF_ARGUMENTS = ("Unrecognized arguments", "ambiguous option", 'expected "subcommand"', "argument subcommand")
"""Beginnings of messages after which the help is of use."""

_OF_CONFIGS = ("--config", "--print_config")
"""Options of jsonargparse, which serve the commands that have a config; here they would be half of a help screen."""


_LIST = "[ITEM,...]"
"""How jsonargparse shows a list of positional arguments."""


class ToolParser(ArgumentParser):
    """Reports an error as one message, without usage, with exit status 2.

    Attributes:
        further: Names of options that the command takes besides those of the parser.
    """

    further: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *arguments: Any, formatter_class: Any = ToolHelp, **options: Any) -> None:
        super().__init__(*arguments, formatter_class=formatter_class, **options)

    def add_argument(self, *names: Any, **options: Any) -> Any:
        action = super().add_argument(*names, **options)
        if action.option_strings[:1] and action.option_strings[0].startswith(_OF_CONFIGS):
            action.help = SUPPRESS
        if not action.option_strings and action.metavar == _LIST:
            action.metavar = f"{action.dest} ..."
        return action

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        command = self.prog.replace(" [options]", "")
        if missing := _MISSING.match(message):
            # jsonargparse asks the parser of all commands, whose name lacks that of the subcommand.
            command = " ".join([command, *filter(None, missing[1].split("."))])
            message = f"{missing[2].upper()} is missing"
        if found := _NO_LIST.search(message):
            message = f"{found[1]}: {found[2]!r} is not a list; an argument before or after it may be missing"
        elif absent := _NO_CONFIG.match(message):
            message = f"--config {absent[1]} is no file; give the path of a YAML file"
        elif message.startswith("Parser key"):
            from lit_lora.config_errors import explain  # imports PEFT

            message = explain(message)
        message = in_full(message) or message
        unknown = _ABSENT.match(message)
        if unknown and any(action.dest == unknown[1] and not action.option_strings for action in self._actions):
            message = f"{unknown[1]} is given without --{unknown[1]}: {command} {unknown[1].upper()}"
        elif unknown:
            message = no_option(
                unknown[1],
                option_names(self._actions) | self.further,
                f"{command} --help shows all arguments",
                "--",
            )
        if missing or found or message.startswith(_OF_ARGUMENTS):
            message = f"{message.rstrip('.')}; {command} --help shows all arguments"
        print_error(message)
        self.exit(2)


def run_tool(function: Callable[..., Any] | dict[str, Any], arguments: list[str], prog: str, **options: Any) -> Any:
    """Call a typed function, or one of several, with the arguments of a command line.

    Args:
        function: Function to call, or functions by the name of their subcommand.
        arguments: Arguments of the command line.
        prog: Name of the command, for its help.
        **options: Further options of the parser.

    Raises:
        UserError: If an option is given more than once.
    """
    given = Counter(argument.partition("=")[0] for argument in arguments if re.match("--[a-z]", argument))
    if twice := [name for name, count in given.items() if count > 1]:
        raise UserError(
            f"{twice[0]} is given more than once, and only the last would count; give it once, with a list if it takes one"
        )
    return auto_cli(function, args=arguments, prog=prog, as_positional=True, **{"parser_class": ToolParser, **options})
